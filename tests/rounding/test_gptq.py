import pytest
import torch

from loftq.formats import parse_format
from loftq.rounding import Gptq, round_to_nearest
from loftq.rounding.damping import DampingError, damped

FORMATS = ("nf2-g64-dq", "int2-g64-dq", "int3-g32-f16", "nf4-g64-f32", "sint4-channel-bf16",
           "uniform4", "iq4nl", "even2-g64-f32")  # fmt: skip
OUT, IN = 24, 150  # two groups of 64 and a shorter one


def weights(n=2, seed=0):
    return torch.randn(n, OUT, IN, generator=torch.Generator().manual_seed(seed))


def grams(n=2, tokens=600, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, tokens, IN, generator=g) @ torch.randn(n, IN, IN, generator=g)
    return x.mT @ x / tokens


def fit_of(spec):
    return "absmax" if spec.grid == "uniform" else "mse"


def output_error(W, values, H, damping=0.01):
    E = (W - values).double()
    return ((E @ damped(H, damping)) * E).sum((1, 2))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_with_identity_gram_equals_rtn(name, act_order):
    W, spec = weights(), parse_format(name)
    eye = torch.eye(IN).expand(2, -1, -1)
    gptq = Gptq(eye, spec, fit=fit_of(spec), damping=0.01, act_order=act_order)
    rounded, values = gptq(W)
    plain, expected = round_to_nearest(W, spec, fit=fit_of(spec))
    assert torch.equal(rounded.codes, plain.codes)
    assert torch.equal(rounded.scales, plain.scales)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_values_are_those_of_the_packed_weight(name, act_order):
    W, spec = weights(), parse_format(name)
    rounded, values = Gptq(grams(), spec, fit=fit_of(spec), damping=0.01, act_order=act_order)(W)
    for i in range(len(W)):
        assert torch.equal(rounded.pack(i).dequantize(), values[i])


@pytest.mark.parametrize("name", ["int2-g64-dq", "nf3-g64-dq", "int4-g32-f16"])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_output_error_is_far_below_that_of_rounding(name, act_order):
    W, H, spec = weights(), grams(), parse_format(name)
    _, values = Gptq(H, spec, fit="mse", damping=0.01, act_order=act_order)(W)
    _, plain = round_to_nearest(W, spec, fit="mse")
    assert (output_error(W, values, H) < 0.7 * output_error(W, plain, H)).all()


def test_one_row_step_by_step_in_float64():
    """The definition, with inverses of what is left of H, against the sweep."""
    W, H, spec = weights(1), grams(1), parse_format("nf4-g256-f32")
    rounded, values = Gptq(H, spec, fit="absmax", damping=0.05)(W)
    H, w, scale = damped(H, 0.05)[0], W[0].double(), rounded.scales[0]
    levels = torch.tensor(spec.levels).double()
    for j in range(IN):
        inverse = torch.linalg.inv(H[j:, j:])
        unit = w[:, j] / scale[:, 0]
        nearest = levels[(unit[:, None] - levels).abs().argmin(1)] * scale[:, 0]
        step = (w[:, j] - nearest) / inverse[0, 0]
        w[:, j:] -= step[:, None] * inverse[0]
        assert torch.allclose(w[:, j], nearest)
    same = (values[0].double() - w).abs() < 1e-5
    assert same.double().mean() > 0.999  # a value near the middle of two levels may fall elsewhere


def test_columns_of_dead_inputs_are_rounded_to_nearest():
    W, H, spec = weights(1), grams(1), parse_format("int3-g64-f32")
    H[:, 5] = H[:, :, 5] = 0
    _, values = Gptq(H, spec, fit="mse", damping=0.01)(W)
    assert torch.isfinite(values).all()
    assert (values - W)[0, :, 5].abs().max() < W.abs().max()


def test_weights_of_a_stack_do_not_influence_each_other():
    W, H, spec = weights(3), grams(3), parse_format("int2-g64-dq")
    together, _ = Gptq(H, spec, fit="mse", damping=0.01)(W)
    for i in range(3):
        alone, _ = Gptq(H[i : i + 1], spec, fit="mse", damping=0.01)(W[i : i + 1])
        assert torch.equal(alone.codes[0], together.codes[i])


def test_damping_is_recorded_and_strict_refuses_more():
    H = -1e-3 * torch.eye(IN)[None] + 0.1 * torch.ones(1, IN, IN)
    spec = parse_format("int4-g64-f32")
    assert Gptq(H, spec, fit="mse", damping=1e-5).damping[0] > 1e-5
    with pytest.raises(DampingError, match="damping=1e-05"):
        Gptq(H, spec, fit="mse", damping=1e-5, strict=True)
