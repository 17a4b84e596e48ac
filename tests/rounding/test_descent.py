import pytest
import torch

from loftq.formats import parse_format
from loftq.rounding import DescentGptq, Gptq, damped, descend, output_error, round_to_nearest

OUT, IN = 16, 150
FORMATS = ["int2-g64-dq", "nf2-g64-dq", "int3-g32-f16", "sint4-channel-f32"]


def weights(n=2):
    return torch.randn(n, OUT, IN, generator=torch.Generator().manual_seed(0))


def grams(n=2, tokens=600):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, tokens, IN, generator=g) @ torch.randn(n, IN, IN, generator=g)
    return x.mT @ x / tokens


@pytest.mark.parametrize("name", FORMATS)
def test_no_sweep_raises_the_output_error(name):
    W, H = weights(), damped(grams(), 0.01)
    now, values = round_to_nearest(W, parse_format(name), fit="mse")
    errors = [output_error(W - values, H)]
    for _ in range(4):
        now, values = descend(W, H, now)
        errors.append(output_error(W - values, H))
    falls = torch.stack(errors).diff(dim=0)
    assert (falls <= 1e-6 * errors[0]).all()
    assert (falls[0] < -0.05 * errors[0]).all()


def test_where_it_ends_no_single_code_can_be_improved():
    W, H, spec = weights(1), damped(grams(1), 0.01), parse_format("int2-g64-f32")
    now, _ = round_to_nearest(W, spec, fit="mse")
    for _ in range(60):
        before = now.codes
        now, values = descend(W, H, now)
        if torch.equal(before, now.codes):
            break
    least = output_error(W - values, H)
    for j in range(0, IN, 7):
        for code in range(4):
            other = now.where(torch.tensor([True]), now)
            other.codes[0, 3, j] = code
            assert output_error(W - other.decode(), H) >= least * (1 - 1e-6)


def test_with_an_identity_gram_nearest_codes_are_left_alone():
    W, spec = weights(), parse_format("nf3-g64-dq")
    rounded, values = round_to_nearest(W, spec, fit="mse")
    found, same = descend(W, torch.eye(IN).expand(2, -1, -1), rounded)
    assert torch.equal(found.codes, rounded.codes)
    assert torch.equal(same, values)


@pytest.mark.parametrize("name", FORMATS)
def test_descent_after_gptq_is_better_than_gptq_in_what_is_stored(name):
    W, H, spec = weights(), grams(), parse_format(name)
    gptq = Gptq(H, spec, fit="mse", damping=0.01)
    _, before = gptq(W)
    rounded, after = DescentGptq(gptq, H)(W)
    full = damped(H, 0.01)
    assert (output_error(W - after, full) < output_error(W - before, full)).all()
    for i in range(len(W)):
        assert torch.equal(rounded.pack(i).dequantize(), after[i])
