"""DREAM (arXiv:1902.00164): three answers to a question about a dialogue.

Settings are those that the paper of LoftQ uses for classes (arXiv:2310.08659, appendix), at the
length that holds most dialogues; neither LoftQ nor LoRA ensembles report this task.
"""

from __future__ import annotations

from loftq.tasks.base import Splits
from loftq.tasks.kinds.choice import Choice

DREAM = Choice(
    name="dream",
    title="DREAM",
    local="dream",
    hub=None,
    splits=Splits(train=("train",), validation=("validation",), test=("test",)),
    columns=("dialogue", "question", "choice", "answer"),
    context="dialogue",
    question="question",
    choices="choice",
    answer="answer",
    count=3,
    metrics=("accuracy",),
    primary="accuracy",
    defaults={
        "batch_size": 16, "gradient_accumulation": 1, "epochs": 4, "learning_rate": 1e-4,
        "scheduler": "linear", "warmup": 0.06, "checkpointing": False, "max_length": 256,
    },
    paper="arXiv:1902.00164",
)  # fmt: skip
"""The authors publish one JSON file a split with the questions of a dialogue together; a row here
is one question, with the columns of the hub's former copy."""
