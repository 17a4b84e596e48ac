"""IR-QLoRA (Qin et al., arXiv:2402.05445), its information-calibrated quantization.

Q = q(W) with the zero of each group where the entropy of its codes is largest (formats/entropy.py),
B = 0. It needs a format that stores a zero, `int`; the paper shifts NormalFloat by an 8-bit number
instead. Its elastic connection, means of segments of x added to what the adapter reads and gives,
is a layer and not a start: it is not here.
"""

from loftq.methods.base import Method

IR_QLORA = Method(
    name="ir-qlora",
    paper="2402.05445",
    summary="IR-QLoRA: zeros at the largest entropy of the codes; adapters start at zero.",
    iterations=0,
    grid="int",
    scale_fit="entropy",
    reproduction=True,
)
