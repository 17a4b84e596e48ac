"""Ensembles of adapters on one packed backbone (arXiv:2310.00035)."""

from loftq.lab.ensemble.result import AverageResult, EnsembleResult, Outside, Quality
from loftq.lab.ensemble.score import score_ensemble
from loftq.lab.ensemble.train import Follower, train_ensemble, train_members

__all__ = [
    "AverageResult",
    "EnsembleResult",
    "Follower",
    "Outside",
    "Quality",
    "score_ensemble",
    "train_ensemble",
    "train_members",
]
