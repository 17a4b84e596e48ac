"""Summarization: XSum, CNN/DailyMail, SciTLDR.

Defaults are those of LoftQ for BART-large (arXiv:2310.08659, appendix); documents are cut at 512
tokens.
"""

from __future__ import annotations

from loftq.tasks.base import Splits
from loftq.tasks.kinds.summarization import Summarization

_SPLITS = Splits(train=("train",), validation=("validation",), test=("test",))
_SETTINGS = {
    "batch_size": 8, "gradient_accumulation": 4, "epochs": 25, "learning_rate": 2e-4,
    "scheduler": "linear", "warmup": 0.0, "checkpointing": False, "max_length": 512,
}  # fmt: skip

XSUM = Summarization(
    name="xsum",
    title="XSum",
    local="xsum",
    hub="EdinburghNLP/xsum",
    splits=_SPLITS,
    document="document",
    summary="summary",
    answer_tokens=64,
    defaults=_SETTINGS,
    paper="arXiv:1808.08745",
)
CNN_DAILYMAIL = Summarization(
    name="cnn-dailymail",
    title="CNN/DailyMail",
    local="cnn_dailymail",
    hub="abisee/cnn_dailymail:3.0.0",
    splits=_SPLITS,
    document="article",
    summary="highlights",
    answer_tokens=128,
    defaults={**_SETTINGS, "gradient_accumulation": 8, "epochs": 15},
    paper="arXiv:1704.04368",
)
SCITLDR = Summarization(
    name="scitldr",
    title="SciTLDR",
    local="scitldr",
    hub=None,
    splits=_SPLITS,
    document="document",
    summary="summaries",
    answer_tokens=64,
    defaults={**_SETTINGS, "epochs": 4},
    paper="arXiv:2004.15011",
)
"""The abstracts (SciTLDR-A) as one text; the hub's copy is a list of sentences, so files only."""
