"""How good predicted probabilities are: likelihood, Brier score, calibration, and disagreement.

All functions take probabilities (rows, classes) that sum to 1 and labels (rows,), as numpy arrays;
`members` add a first axis.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15
FLOOR = 1e-12
"""Smallest probability whose logarithm is taken: float32 softmax gives 0 for less than 1e-38."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Rows whose confidence lies in one interval: a bar of a reliability diagram."""

    low: float
    high: float
    rows: int
    confidence: float
    """Mean of their largest probability."""
    accuracy: float
    """Share of them that is right."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def accuracy(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of rows whose most probable class is the label."""
    return float((probabilities.argmax(-1) == labels).mean())


def negative_log_likelihood(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean of -log p(label), in nats a row."""
    return float(row_losses(probabilities, labels).mean())


def row_losses(probabilities: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """-log p(label) of each row, (rows,)."""
    import numpy as np

    right = np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]
    return -np.log(np.maximum(right, FLOOR))


def brier(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean of sum_k (p_k - [k = label])^2: 0 for certainty that is right, 2 for one that is not."""
    import numpy as np

    wanted = np.eye(probabilities.shape[-1])[labels]
    return float(((probabilities - wanted) ** 2).sum(-1).mean())


def reliability(
    probabilities: NDArray[Any], labels: NDArray[Any], *, bins: int = BINS
) -> list[Bin]:
    """Confidence against accuracy in equal intervals of confidence; empty ones are left out."""
    import numpy as np

    confidence = probabilities.max(-1)
    right = probabilities.argmax(-1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(
            low=k / bins,
            high=(k + 1) / bins,
            rows=int(found.sum()),
            confidence=float(confidence[found].mean()),
            accuracy=float(right[found].mean()),
        )
        for k in range(bins)
        if (found := place == k).any()
    ]


def calibration_error(
    probabilities: NDArray[Any], labels: NDArray[Any], *, bins: int = BINS
) -> float:
    """Expected calibration error (arXiv:1706.04599): sum_b n_b / n |accuracy_b - confidence_b|."""
    found = reliability(probabilities, labels, bins=bins)
    total = sum(entry.rows for entry in found)
    return sum(entry.rows * abs(entry.accuracy - entry.confidence) for entry in found) / total


def disagreement(members: NDArray[Any]) -> float:
    """Mean share of rows on which two members choose different classes; members (m, rows, k)."""
    choices = members.argmax(-1)
    count = len(choices)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return sum(float((choices[i] != choices[j]).mean()) for i, j in pairs) / max(1, len(pairs))


def divergence(members: NDArray[Any]) -> float:
    """Mean KL(member || ensemble), nats: the mutual information of prediction and member.

    It is 0 for identical members.
    """
    import numpy as np

    mean = members.mean(0)
    ratio = np.log(np.maximum(members, FLOOR)) - np.log(np.maximum(mean, FLOOR))
    return float((members * ratio).sum(-1).mean())


def entropy(probabilities: NDArray[Any]) -> NDArray[Any]:
    """-sum_k p_k log p_k of each row, nats, (rows,)."""
    import numpy as np

    found: NDArray[Any] = -(probabilities * np.log(np.maximum(probabilities, FLOOR))).sum(-1)
    return found


def auroc(inside: NDArray[Any], outside: NDArray[Any]) -> float:
    """Chance that a row from outside scores higher than one from inside, ties counting half.

    The area under the ROC curve of a detector of foreign rows (Mann and Whitney's U over its
    largest value): 1 tells them apart always, 0.5 is a coin.

    Args:
        inside: scores of rows of the task, such as their entropy.
        outside: scores of rows of another task.
    """
    import numpy as np

    ordered = np.sort(inside)
    below = np.searchsorted(ordered, outside, side="left")
    upto = np.searchsorted(ordered, outside, side="right")
    return float((below + upto).mean() / (2 * len(inside)))
