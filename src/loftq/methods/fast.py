"""`fast`, ours: variable projection with coordinate descent, from one pass over calibration text.

Q is rounded for what it costs *after* the best correction (schedules/projection.py), by GPTQ with
refitted scales and another look at every column (rounding/descent.py); B A is the closed form under
the Gram. docs/methods.md has the ablation that chose these parts.
"""

from loftq.methods.base import Method

FAST = Method(
    name="fast",
    paper="",
    summary="Ours, needs text: rounding and correction fitted to the layers' outputs, in minutes.",
    needs="gram",
    metric="gram",
    rounding="gptq-descent",
    schedule="projection",
    damping=0.03,
    iterations=5,
)
