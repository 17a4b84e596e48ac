"""Metrics of predicted classes and numbers, from scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq.tasks.base import TaskError
from loftq.tasks.scores import Score, bootstrapped, exactly, share

if TYPE_CHECKING:
    import numpy as np


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is never predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, pos_label=1, zero_division=0.0))


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews' correlation; 0 where all predictions are of one class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def _pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's correlation; 0 where all predictions are the same number."""
    from scipy.stats import pearsonr

    if _constant(predictions) or _constant(references):
        return 0.0
    return float(pearsonr(predictions, references).statistic)


def _spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where all predictions are the same number."""
    from scipy.stats import spearmanr

    if _constant(predictions) or _constant(references):
        return 0.0
    return float(spearmanr(predictions, references).statistic)


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    return float((predictions == references).mean())


@dataclass(frozen=True)
class Metric:
    """A figure of all predictions together."""

    of: Callable[[Any, Any], float]
    """(predictions, references), arrays of equal length -> value."""
    needs_contrast: bool
    """Whether references that are all the same leave it undefined."""


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(_accuracy, needs_contrast=False),
    "f1": Metric(_f1, needs_contrast=True),
    "matthews": Metric(_matthews, needs_contrast=True),
    "pearson": Metric(_pearson, needs_contrast=True),
    "spearman": Metric(_spearman, needs_contrast=True),
}
"""By the name in tables and files. A constant prediction is an answer, and its score is 0; constant
references make a correlation meaningless and are refused."""


def score(
    names: Sequence[str],
    predictions: Sequence[float],
    references: Sequence[float],
    *,
    task: str,
    intervals: bool = True,
) -> dict[str, Score]:
    """Several metrics of the same predictions.

    Args:
        names: rows of METRICS.
        predictions: classes or numbers.
        references: the right ones.
        task: for messages.
        intervals: resampling takes a second or two; without it low = high = value.

    Raises:
        TaskError: references that leave a metric undefined.
    """
    import numpy as np

    refuse_undefined(names, references, task=task)
    found, wanted = np.asarray(predictions), np.asarray(references)
    return {name: _scored(name, found, wanted, intervals) for name in names}


def refuse_undefined(names: Sequence[str], references: Sequence[float], *, task: str) -> None:
    """Refuse references that leave one of the metrics undefined.

    Raises:
        TaskError: they are all the same, and a metric measures how predictions follow them.
    """
    name = next((name for name in names if METRICS[name].needs_contrast), None)
    if name is not None and len(set(references)) == 1:
        raise TaskError(
            f"{task}: all {len(references)} references are {references[0]!r}, which leaves {name} "
            "undefined. Take more rows (eval_rows, validation_rows, holdout, limit), or another "
            "split."
        )


def _scored(name: str, found: np.ndarray, wanted: np.ndarray, intervals: bool) -> Score:
    if name == "accuracy":
        return share((found == wanted).tolist())
    of = METRICS[name].of
    if not intervals:
        return exactly(of(found, wanted), len(found))
    return bootstrapped(lambda chosen: of(found[chosen], wanted[chosen]), len(found))


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())
