"""One row per method, one file per paper; each is a composition of the same parts."""

from loftq.methods.apiq import APIQ_BW, APIQ_LW
from loftq.methods.base import LayerRecord, LayerSolution, Method
from loftq.methods.best import BEST
from loftq.methods.caldera import CALDERA
from loftq.methods.cloq import CLOQ, CLOQ_CORE
from loftq.methods.corda import CORDA
from loftq.methods.eora import EORA
from loftq.methods.fast import FAST
from loftq.methods.ir_qlora import IR_QLORA
from loftq.methods.loftq import LOFTQ, LOFTQ_PAPER
from loftq.methods.lq_lora import LQ_LORA
from loftq.methods.lqer import LQER
from loftq.methods.max import MAX
from loftq.methods.problem import LayerProblem, ProblemStatistics
from loftq.methods.projq import PROJQ
from loftq.methods.qera import QERA_APPROX, QERA_EXACT
from loftq.methods.qlora import QLORA
from loftq.methods.qpissa import QPISSA
from loftq.methods.quailora import QUAILORA
from loftq.methods.rilq import RILQ
from loftq.methods.srr import SRR

_ROWS = (
    LOFTQ,
    QLORA,
    FAST,
    BEST,
    MAX,
    LOFTQ_PAPER,
    IR_QLORA,
    QPISSA,
    LQ_LORA,
    LQER,
    QERA_APPROX,
    QERA_EXACT,
    QUAILORA,
    EORA,
    CLOQ,
    CLOQ_CORE,
    PROJQ,
    SRR,
    CORDA,
    CALDERA,
    APIQ_LW,
    APIQ_BW,
    RILQ,
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}

__all__ = [
    "METHODS",
    "LayerProblem",
    "LayerRecord",
    "LayerSolution",
    "Method",
    "ProblemStatistics",
    "find_method",
]


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: unknown; the message names the nearest one.
    """
    if name in METHODS:
        return METHODS[name]
    import difflib

    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.3)
    hint = f"Did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown method {name!r}. {hint} Known: {', '.join(METHODS)}.")
