"""Scores of probabilities against independent formulas and their limits."""

import numpy as np
import pytest

from loftq.eval import reliability as r


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of 5 members (5, 400, 3) and labels (400,)."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(5, 400, 3)) + 2 * random.normal(size=(1, 400, 3))
    members = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return members, random.integers(0, 3, 400)


def test_certainty_that_is_right_costs_nothing() -> None:
    labels = np.array([0, 2, 1])
    certain = np.eye(3)[labels]
    assert r.negative_log_likelihood(certain, labels) == 0
    assert r.brier(certain, labels) == 0
    assert r.calibration_error(certain, labels) == 0
    assert r.accuracy(certain, labels) == 1
    wrong = np.eye(3)[(labels + 1) % 3]
    assert (r.brier(wrong, labels), r.calibration_error(wrong, labels)) == (2, 1)
    assert np.isfinite(r.negative_log_likelihood(wrong, labels))


def test_scores_agree_with_scikit_learn(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    members, labels = drawn
    probabilities = members[0]
    assert r.negative_log_likelihood(probabilities, labels) == pytest.approx(
        metrics.log_loss(labels, probabilities)
    )
    two = probabilities[:, :2] / probabilities[:, :2].sum(-1, keepdims=True)
    yes = (labels == 1).astype(int)
    assert r.brier(two, yes) == pytest.approx(2 * metrics.brier_score_loss(yes, two[:, 1]))


def test_calibration_error_of_a_case_done_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    # Two rows at 0.95, half right; two at 0.6, both right.
    assert r.calibration_error(probabilities, labels, bins=10) == pytest.approx(
        0.5 * 0.45 + 0.5 * 0.4
    )
    bars = r.reliability(probabilities, labels, bins=10)
    assert [(bar.low, bar.rows, bar.accuracy) for bar in bars] == [(0.6, 2, 1.0), (0.9, 2, 0.5)]


def test_averaging_is_never_worse_than_the_mean_member(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    members, labels = drawn
    single = np.mean([r.row_losses(member, labels) for member in members], axis=0)
    assert (r.row_losses(members.mean(0), labels) <= single + 1e-12).all()


def test_identical_members_have_no_diversity(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    members, _ = drawn
    same = np.repeat(members[:1], 5, axis=0)
    assert r.disagreement(same) == 0
    assert r.divergence(same) == pytest.approx(0, abs=1e-12)
    assert r.divergence(members) > 0.1
    assert 0 < r.disagreement(members) < 1
    assert r.disagreement(members[:2]) == float(
        (members[0].argmax(-1) != members[1].argmax(-1)).mean()
    )
