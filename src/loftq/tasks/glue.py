"""GLUE (arXiv:1804.07461): nine tasks, each with its own metrics, on the validation split.

The test labels are not public; as in papers the published validation split is what is reported. The
checkpoint is chosen on rows held out of train, never on it. Defaults are those of LoftQ
(arXiv:2310.08659, appendix: NF2 column; batch 32, no warmup, 128 tokens).
"""

from __future__ import annotations

from typing import Any

from loftq.tasks.base import Splits, Task
from loftq.tasks.kinds.classification import Classification, Regression

PAPER = "arXiv:1804.07461"
SPLITS = Splits(train=("train",), test=("validation",))
ENTAILMENT = ("entailment", "not_entailment")
SIMILAR = ("different", "equivalent")


def _settings(epochs: int, learning_rate: float) -> dict[str, Any]:
    return {
        "batch_size": 32, "gradient_accumulation": 1, "epochs": epochs,
        "learning_rate": learning_rate, "scheduler": "linear", "warmup": 0.0,
        "checkpointing": False, "max_length": 128,
    }  # fmt: skip


def _glue(name: str, title: str, columns: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "local": f"glue/{name}",
        "hub": f"nyu-mll/glue:{name}",
        "splits": SPLITS,
        "columns": (*columns, "label"),
        "paper": PAPER,
    }


PAIR = ("sentence1", "sentence2")

RTE = Classification(
    **_glue("rte", "RTE", PAIR),
    labels=ENTAILMENT,
    metrics=("accuracy",),
    primary="accuracy",
    defaults=_settings(20, 5e-5),
)
WNLI = Classification(
    **_glue("wnli", "WNLI", PAIR),
    labels=("not_entailment", "entailment"),
    metrics=("accuracy",),
    primary="accuracy",
    defaults=_settings(20, 5e-5),
)
MRPC = Classification(
    **_glue("mrpc", "MRPC", PAIR),
    labels=SIMILAR,
    metrics=("accuracy", "f1"),
    primary="accuracy",
    defaults=_settings(60, 1e-4),
)
COLA = Classification(
    **_glue("cola", "CoLA", ("sentence",)),
    labels=("unacceptable", "acceptable"),
    metrics=("matthews", "accuracy"),
    primary="matthews",
    defaults=_settings(60, 5e-5),
)
SST2 = Classification(
    **_glue("sst2", "SST-2", ("sentence",)),
    labels=("negative", "positive"),
    metrics=("accuracy",),
    primary="accuracy",
    defaults=_settings(10, 5e-5),
)
STSB = Regression(
    **_glue("stsb", "STS-B", PAIR),
    span=(0.0, 5.0),
    metrics=("pearson", "spearman"),
    primary="spearman",
    defaults=_settings(60, 1e-4),
)
QQP = Classification(
    **_glue("qqp", "QQP", ("question1", "question2")),
    labels=SIMILAR,
    metrics=("accuracy", "f1"),
    primary="accuracy",
    defaults=_settings(10, 5e-5),
)
QNLI = Classification(
    **_glue("qnli", "QNLI", ("question", "sentence")),
    labels=ENTAILMENT,
    metrics=("accuracy",),
    primary="accuracy",
    defaults=_settings(10, 5e-5),
)
MNLI = Classification(
    **_glue("mnli", "MNLI", ("premise", "hypothesis"))
    | {"splits": Splits(train=("train",), test=("validation_matched", "validation_mismatched"))},
    labels=("entailment", "neutral", "contradiction"),
    metrics=("accuracy",),
    primary="accuracy",
    defaults=_settings(5, 1e-4),
)

GLUE: tuple[Task, ...] = (RTE, MRPC, COLA, STSB, SST2, QNLI, QQP, MNLI, WNLI)
