"""The losses against float64 definitions, and what they leave out."""

import pytest
import torch
from torch.nn import functional as F

from loftq.refine import hidden_error, losses, mean_divergence, next_token_loss, squared_error

VOCABULARY, WIDTH = 11, 6


def states(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])


def head(seed: int) -> losses.Head:
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(seed))
    return lambda hidden: hidden @ table.to(hidden.dtype).T


@pytest.mark.parametrize("loss", [squared_error, hidden_error])
def test_an_output_has_no_error_against_itself_and_one_against_zero(loss: object) -> None:
    y = states(0)
    assert loss(y, y, MASK) == 0
    torch.testing.assert_close(loss(torch.zeros_like(y), y, MASK), torch.tensor(1.0))


@pytest.mark.parametrize("loss", [squared_error, hidden_error])
def test_padding_counts_nowhere(loss: object) -> None:
    y_hat, y = states(0), states(1)
    expected = loss(y_hat, y, MASK)
    y_hat[~MASK] = torch.inf
    assert loss(y_hat, y, MASK) == expected
    assert loss(y_hat.flatten(0, 1), y.flatten(0, 1), MASK) == expected


def test_each_token_weighs_alike_only_in_the_error_per_token() -> None:
    y = torch.ones(1, 2, WIDTH)
    y[0, 0] *= 1000  # as the first token of many decoders
    y_hat = y.clone()
    y_hat[0, 1] = 0
    mask = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(hidden_error(y_hat, y, mask), torch.tensor(0.5))
    assert squared_error(y_hat, y, mask) < 1e-5


def test_the_divergence_is_that_of_the_two_distributions_and_zero_for_equal_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "TOKENS_AT_ONCE", 3)  # eight tokens in three chunks
    h_hat, h, heads = states(0).requires_grad_(), states(1), (head(2), head(3))
    found = mean_divergence(h_hat, h, heads, MASK)
    log_q = F.log_softmax(heads[0](h_hat.double()), -1)[MASK]
    log_p = F.log_softmax(heads[1](h.double()), -1)[MASK]
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(found, h_hat)
    (wanted,) = torch.autograd.grad(expected, h_hat)
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[~MASK].any()
    same = mean_divergence(h, h, (head(2), head(2)), MASK)
    torch.testing.assert_close(same, torch.zeros(()), atol=1e-6, rtol=0)


def test_the_text_counts_where_a_token_and_the_one_before_it_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "TOKENS_AT_ONCE", 2)
    h_hat, ids = states(0), torch.arange(10).view(2, 5)
    found = next_token_loss(h_hat, ids, head(2), MASK)
    logits = head(2)(h_hat)
    expected = F.cross_entropy(
        torch.cat([logits[0, :4], logits[1, :2]]), torch.cat([ids[0, 1:], ids[1, 1:3]])
    )
    torch.testing.assert_close(found, expected)
