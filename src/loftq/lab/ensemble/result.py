"""What an ensemble gains over its members, as figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loftq.eval import reliability as scores
from loftq.tasks.scores import bootstrapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDING = 1e-6
"""Nats by which float arithmetic may miss Jensen's inequality."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores of predicted probabilities."""

    accuracy: float
    nll: float
    """Nats a row."""
    brier: float
    ece: float
    """Expected calibration error, 15 bins."""
    ece_interval: tuple[float, float]
    """95 % by resampling rows; the error of a finite sample is biased upwards in itself."""


@dataclass(frozen=True, kw_only=True)
class Outside:
    """How well uncertainty tells the task's rows from another task's; 0.5 is a coin, 1 always."""

    task: str
    rows: int
    confidence: float
    """AUROC of 1 - max_k p_k of the ensemble."""
    entropy: float
    """AUROC of the ensemble's entropy."""
    divergence: float
    """AUROC of the members' mean KL to the ensemble: a row on which they differ."""
    member_entropy: float
    """Mean AUROC of the members' own entropies."""


@dataclass(frozen=True, kw_only=True)
class EnsembleResult:
    """Members and their average on one split."""

    task: str
    split: str
    rows: int
    members: tuple[Quality, ...]
    ensemble: Quality
    disagreement: float
    """Mean share of rows on which two members differ."""
    divergence: float
    """Mean KL(member || ensemble), nats."""
    diagram: tuple[Mapping[str, Any], ...]
    """Bars of the ensemble's reliability diagram."""
    member_diagram: tuple[Mapping[str, Any], ...]
    """The same of all members' predictions taken together."""
    outside: tuple[Outside, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """Members and their average by the metrics of a task without classes."""

    task: str
    primary: str
    """The headline metric."""
    members: tuple[Mapping[str, Mapping[str, Mapping[str, Any]]], ...]
    """Of each: split -> metric -> value, low, high, rows, interval."""
    ensemble: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def quality(probabilities: NDArray[Any], labels: NDArray[Any]) -> Quality:
    """All scores of probabilities (rows, classes) against labels (rows,)."""
    ece = bootstrapped(
        lambda chosen: scores.calibration_error(probabilities[chosen], labels[chosen]), len(labels)
    )
    return Quality(
        accuracy=scores.accuracy(probabilities, labels),
        nll=scores.negative_log_likelihood(probabilities, labels),
        brier=scores.brier(probabilities, labels),
        ece=ece.value,
        ece_interval=(ece.low, ece.high),
    )


def result_of(
    task: str,
    split: str,
    members: NDArray[Any],
    labels: NDArray[Any],
    outside: Mapping[str, NDArray[Any]],
) -> EnsembleResult:
    """All figures of probabilities.

    Args:
        task: name.
        split: that was scored.
        members: (members, rows, classes).
        labels: (rows,).
        outside: another task's name -> the same members on its rows.
    """
    import numpy as np

    # As row_losses floors them: the mean of what is floored, not the floored mean, obeys Jensen.
    members = np.maximum(members, scores.FLOOR)
    mean = members.mean(0)
    # -log of a mean is at most the mean of -log, row by row and so on every batch of rows.
    each = np.stack([scores.row_losses(member, labels) for member in members])
    assert (scores.row_losses(mean, labels) <= each.mean(0) + ROUNDING).all(), "not an average"
    joined = scores.reliability(np.concatenate([*members]), np.tile(labels, len(members)))
    return EnsembleResult(
        task=task,
        split=split,
        rows=len(labels),
        members=tuple(quality(member, labels) for member in members),
        ensemble=quality(mean, labels),
        disagreement=scores.disagreement(members),
        divergence=scores.divergence(members),
        diagram=tuple(bar.to_dict() for bar in scores.reliability(mean, labels)),
        member_diagram=tuple(bar.to_dict() for bar in joined),
        outside=tuple(_outside(name, members, found) for name, found in outside.items()),
    )


def _outside(task: str, inside: NDArray[Any], outside: NDArray[Any]) -> Outside:
    import numpy as np

    means = inside.mean(0), outside.mean(0)
    entropies = [scores.entropy(members) for members in (inside, outside)]  # (members, rows)
    whole = [scores.entropy(mean) for mean in means]
    # mean_m KL(p_m || mean) = H(mean) - mean_m H(p_m)
    differ = [total - each.mean(0) for total, each in zip(whole, entropies, strict=True)]
    return Outside(
        task=task,
        rows=outside.shape[1],
        confidence=scores.auroc(*(1 - mean.max(-1) for mean in means)),
        entropy=scores.auroc(*whole),
        divergence=scores.auroc(*differ),
        member_entropy=float(
            np.mean([scores.auroc(a, b) for a, b in zip(*entropies, strict=True)])
        ),
    )
