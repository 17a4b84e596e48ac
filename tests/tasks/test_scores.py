"""Metrics and their intervals, against libraries and by hand."""

import math

import numpy as np
import pytest

from loftq.tasks import TASKS, TaskError, TaskRow
from loftq.tasks.kinds.reasoning import final_number
from loftq.tasks.kinds.spans import normalized, word_f1
from loftq.tasks.metrics import score
from loftq.tasks.scores import bootstrapped, mean, share


def row(**values: object) -> TaskRow:
    return TaskRow(values=values, place="here")


def test_wilson_is_the_textbook_interval() -> None:
    found = share([True] * 8 + [False] * 2)
    assert found.value == 0.8
    assert (found.low, found.high) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    none = share([False] * 50)
    assert none.low == 0
    assert none.high == pytest.approx(0.07135, abs=1e-5)


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    found = mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    again = mean(values.tolist())
    assert (again.low, again.high) == (found.low, found.high)


def test_a_weighted_mean_counts_tokens_not_rows() -> None:
    assert mean([1.0, 4.0], [3, 1]).value == pytest.approx(1.75)


def test_a_metric_of_all_rows_is_resampled_by_rows() -> None:
    figures = np.arange(10.0)
    found = bootstrapped(lambda chosen: float(figures[chosen].max()), 10)
    assert found.value == found.high == 9


def test_glue_metrics_by_hand() -> None:
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    found = score(("accuracy", "f1", "matthews"), predictions, references, task="t")
    assert found["accuracy"].value == pytest.approx(0.6)
    assert found["f1"].value == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    # tp 2, tn 1, fp 1, fn 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert found["matthews"].value == pytest.approx(1 / 6)
    ranks = score(("pearson", "spearman"), [1.0, 2.0, 9.0], [1.0, 2.0, 3.0], task="t")
    assert ranks["spearman"].value == pytest.approx(1)
    assert ranks["pearson"].value == pytest.approx(0.91766, abs=1e-5)


def test_a_constant_prediction_scores_zero_and_a_constant_reference_is_refused() -> None:
    found = score(("matthews",), [1, 1, 1], [0, 1, 1], task="cola")
    assert found["matthews"].value == 0
    assert score(("spearman",), [2.0, 2.0], [1.0, 3.0], task="stsb")["spearman"].value == 0
    with pytest.raises(
        TaskError, match="cola: all 3 references are 1, which leaves matthews undef"
    ):
        score(("matthews", "accuracy"), [0, 1, 1], [1, 1, 1], task="cola")
    assert score(("accuracy",), [1], [1], task="rte")["accuracy"].value == 1


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized("The  Cat, an animal!") == "cat animal"
    assert word_f1("the black cat", "cat") == pytest.approx(2 / 3)
    assert word_f1("dog", "cat") == 0
    task = TASKS["squad"]
    rows = [row(answers={"text": ["Denver Broncos", "The Broncos"]})] * 2
    found = task.score(["broncos", "Denver"], rows)
    assert found["exact_match"].value == 0.5
    assert found["f1"].value == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 + 1\n#### 2", "2"), ("#### 1,234", "1234"), ("#### -3.5 cats", "-3.5"), ("so 4", None),
        ("####5", None), ("#### 2\n#### 3", "2"),
    ],
)  # fmt: skip
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_exact_match_and_answer_loss() -> None:
    rows = [row(question="q", answer="x\n#### 1,000"), row(question="q", answer="y\n#### 2")]
    said = [
        {"text": "so #### 1000", "nats": 3.0, "tokens": 3},
        {"text": "#### 3", "nats": 8.0, "tokens": 1},
    ]
    found = TASKS["gsm8k"].score(said, rows)
    assert found["exact_match"].value == 0.5
    assert found["answer_loss"].value == pytest.approx(11 / 4)
    assert set(TASKS["gsm8k-loss"].score(said, rows)) == {"answer_loss"}


def test_rouge_takes_the_best_of_several_summaries() -> None:
    rows = [row(document="d", summaries=["a big dog", "the cat sat"])]
    found = TASKS["scitldr"].score(["the cat sat"], rows)
    assert [found[name].value for name in ("rouge1", "rouge2", "rougeL")] == [1, 1, 1]
    half = TASKS["scitldr"].score(["the cat"], rows)
    assert half["rouge1"].value == pytest.approx(0.8)  # precision 1, recall 2/3


def test_perplexities_are_those_of_their_windows() -> None:
    result = {"protocol": "gptq", "windows": [2.0, 4.0], "units": 3}
    found = TASKS["wikitext2"].score([result], [])
    score_ = found["perplexity_gptq"]
    assert score_.value == pytest.approx(math.exp(2))
    assert score_.low < score_.value < score_.high


def test_every_task_has_settings_that_a_run_takes() -> None:
    from loftq.tasks.config import choose

    for task in TASKS.values():
        chosen = choose(task, {})
        assert task.primary in task.metric_names
        assert chosen.config.learning_rate == task.defaults["learning_rate"]
        assert task.columns
