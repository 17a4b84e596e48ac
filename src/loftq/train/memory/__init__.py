"""What training takes: bytes by part, what would save most, and what fits a budget.

subject = subject_of_output(Path("OUT"))
peak = predict(subject, TrainingSettings(batch_size=4, length=1024))
savings(subject, TrainingSettings(batch_size=4, length=1024))
fit(configurable("MODEL", {}), parse_size("8GB"))
"""

from loftq.train.memory.budget import parse_size, usable
from loftq.train.memory.fit import Fit, FitChoice, NothingFits, fit
from loftq.train.memory.predict import PARTS, PeakMemory, TrainingSettings, predict
from loftq.train.memory.savings import Saving, savings
from loftq.train.memory.source import configurable, context_limit
from loftq.train.memory.speed import Pace, pace
from loftq.train.memory.subject import (
    Subject,
    UnknownModel,
    subject_of_config,
    subject_of_model,
    subject_of_output,
    subject_of_plan,
)

__all__ = [
    "PARTS",
    "Fit",
    "FitChoice",
    "NothingFits",
    "Pace",
    "PeakMemory",
    "Saving",
    "Subject",
    "TrainingSettings",
    "UnknownModel",
    "configurable",
    "context_limit",
    "fit",
    "pace",
    "parse_size",
    "predict",
    "savings",
    "subject_of_config",
    "subject_of_model",
    "subject_of_output",
    "subject_of_plan",
    "usable",
]
