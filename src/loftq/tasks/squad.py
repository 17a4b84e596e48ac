"""SQuAD v1.1 (arXiv:1606.05250), and a small stand-in that fits beside a test suite.

Defaults are those of LoftQ (arXiv:2310.08659, appendix), windows those of the authors' baseline.
"""

from __future__ import annotations

from loftq.tasks.base import Splits
from loftq.tasks.kinds.spans import Spans

_SETTINGS = {
    "batch_size": 16, "gradient_accumulation": 1, "epochs": 10, "learning_rate": 5e-5,
    "scheduler": "linear", "warmup": 0.0, "checkpointing": False, "max_length": 384,
}  # fmt: skip

SQUAD = Spans(
    name="squad",
    title="SQuAD v1.1",
    local="squad",
    hub="rajpurkar/squad",
    splits=Splits(train=("train",), test=("validation",), by="title"),
    columns=("title", "question", "context", "answers"),
    defaults=_SETTINGS,
    paper="arXiv:1606.05250",
)

XQUAD_EN = Spans(
    name="xquad-en",
    title="XQuAD (English)",
    local="squad/xquad_en",
    hub=None,
    splits=Splits(train=("train",), test=("test",), by="title", first=36),
    columns=("title", "question", "context", "answers"),
    defaults={**_SETTINGS, "epochs": 6},
    paper="arXiv:1910.11856",
)
"""1,190 questions of SQuAD's validation set: the first 36 of 48 articles train, the others test."""
