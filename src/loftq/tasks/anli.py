"""ANLI (arXiv:1910.14599): adversarial inference, its three rounds together."""

from __future__ import annotations

from loftq.tasks.base import Splits
from loftq.tasks.kinds.classification import Classification

ROUNDS = ("r1", "r2", "r3")

ANLI = Classification(
    name="anli",
    title="ANLI",
    local="anli",
    hub="facebook/anli",
    splits=Splits(
        train=tuple(f"train_{name}" for name in ROUNDS),
        validation=tuple(f"dev_{name}" for name in ROUNDS),
        test=tuple(f"test_{name}" for name in ROUNDS),
    ),
    columns=("premise", "hypothesis", "label"),
    labels=("entailment", "neutral", "contradiction"),
    metrics=("accuracy",),
    primary="accuracy",
    defaults={
        "batch_size": 32, "gradient_accumulation": 1, "epochs": 12, "learning_rate": 5e-5,
        "scheduler": "linear", "warmup": 0.0, "checkpointing": False, "max_length": 256,
    },
    paper="arXiv:1910.14599",
)  # fmt: skip
