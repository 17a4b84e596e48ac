"""Perplexity against an independent float64 computation, and its protocol."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import zoo
from loftq.eval import perplexity
from tolerances import FLOAT32_SOLVE, FLOAT64_SOLVE

CONTEXT = 16


class Constant(nn.Module):
    """Gives every token of a vocabulary the same logit, and its target a chosen one."""

    def __init__(self, vocabulary: int, target: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.target = target
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert not torch.is_grad_enabled()
        self.seen.append(input_ids)
        following = nn.functional.one_hot(input_ids.roll(-1, 1), len(self.bias))
        return SimpleNamespace(logits=self.bias + self.target * following)


def stream(tokens: int) -> Tensor:
    return torch.arange(tokens) * 7 % zoo.VOCAB


def by_hand(model: nn.Module, ids: Tensor, context: int) -> float:
    """Mean negative log-likelihood in float64, one prediction at a time."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        for place in range(context - 1):
            probabilities = logits[place].exp() / logits[place].exp().sum()
            total -= math.log(probabilities[window[place + 1]])
            count += 1
    return total / count


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_an_independent_float64_computation(batch: int) -> None:
    model, ids = zoo.build("llama"), stream(3 * CONTEXT + 5)
    result = perplexity(model, ids, context=CONTEXT, batch=batch)
    assert result.nll == pytest.approx(by_hand(model, ids, CONTEXT), rel=FLOAT32_SOLVE)
    assert result.perplexity == math.exp(result.nll)
    assert (result.windows, result.tokens) == (3, 3 * (CONTEXT - 1))
    assert (result.context, result.protocol) == (CONTEXT, "gptq")


def test_small_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build("llama"), stream(2 * CONTEXT)
    whole = perplexity(model, ids, context=CONTEXT)
    module = sys.modules["loftq.eval.perplexity"]  # the package's name is the function
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * zoo.VOCAB)
    chunked = perplexity(model, ids, context=CONTEXT)
    assert chunked.nll == pytest.approx(whole.nll, rel=FLOAT64_SOLVE)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    result = perplexity(Constant(50), stream(40) % 50, context=20)
    assert result.perplexity == pytest.approx(50, rel=FLOAT32_SOLVE)


def test_windows_do_not_overlap_and_start_at_the_beginning() -> None:
    model, ids = Constant(zoo.VOCAB), stream(5 * CONTEXT + 3)
    assert perplexity(model, ids, context=CONTEXT, windows=3).windows == 3
    assert torch.cat(model.seen).flatten().tolist() == ids[: 3 * CONTEXT].tolist()


def test_a_hopeless_model_is_infinite_and_not_an_error() -> None:
    result = perplexity(Constant(10, target=-1000.0), stream(8) % 10, context=4)
    assert result.perplexity == math.inf
    assert result.nll == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_scores_in_eval_mode_and_puts_the_mode_back(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5)).train(training)
    inner = Constant(zoo.VOCAB)
    model.forward = inner.forward  # type: ignore[method-assign]
    model.register_parameter("bias", inner.bias)
    perplexity(model, stream(CONTEXT), context=CONTEXT)
    assert model.training is training


def test_progress_counts_windows_and_ends_at_the_result() -> None:
    calls: list[tuple[int, int, float]] = []
    result = perplexity(
        zoo.build("llama"),
        stream(3 * CONTEXT),
        context=CONTEXT,
        batch=2,
        on_window=lambda *args: calls.append(args),
    )
    assert [call[:2] for call in calls] == [(2, 3), (3, 3)]
    assert calls[-1][2] == result.perplexity


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (15, {"context": 16}, "15 tokens of text give 0 windows of 16, expected one window"),
        (40, {"context": 16, "windows": 3}, "give 2 windows of 16, expected 3 windows"),
        (200, {"context": 65}, "context=65: the model was made for at most 64 tokens"),
        (200, {"context": 1}, "context=1: must be at least 2"),
        (200, {"context": 16, "windows": 0}, "windows=0: must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tokens: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(zoo.build("llama"), stream(tokens), **options)


@pytest.mark.slow
def test_smollm2_first_windows_are_reproduced(data_dir: Path, models_dir: Path) -> None:
    """The first two windows of WikiText-2; all 148 give 21.64 (benchmarks)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loftq.eval import encode, read_text

    folder = models_dir / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = read_text(data_dir / "wikitext2/wiki.test.raw.gz")
    ids = encode(AutoTokenizer.from_pretrained(folder), text[:40_000])
    result = perplexity(model, ids, windows=2)
    with torch.no_grad():
        losses = [
            model(input_ids=w[None], labels=w[None]).loss.item() for w in ids[:4096].split(2048)
        ]
    assert result.nll == pytest.approx(sum(losses) / 2, rel=FLOAT32_SOLVE)
