"""CALDERA (Saha et al., arXiv:2405.18886), its alternation: correct, then round, 20 times.

B_t A_t = svd_r((W - Q_{t-1}) R) R^-1 and Q_t = ldlq(W - B_t A_t) under H = R R^T, Q_0 = 0, the
best iterate kept. LDLQ is GPTQ (QuIP, arXiv:2307.13304, Theorem 6). The paper's lattice codebook
and Hadamard rotations are not here: Q is in the format that was asked for. Nor are its 4-bit
factors: A and B stay float32, which is in its favour.
"""

from loftq.methods.base import Method

CALDERA = Method(
    name="caldera",
    paper="2405.18886",
    summary="CALDERA's alternation: correct, then GPTQ, 20 times; no lattice, factors unquantized.",
    needs="gram",
    metric="gram",
    rounding="gptq",
    order="correct-first",
    iterations=20,
    reproduction=True,
)
