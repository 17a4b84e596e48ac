import pytest
import torch

from loftq.formats import parse_format
from loftq.rounding import Gptq, damped, output_error, refit_scales
from loftq.rounding.refit import _equations, equations_at_once

OUT, IN = 16, 150


def weights(n=2):
    return torch.randn(n, OUT, IN, generator=torch.Generator().manual_seed(0))


def grams(n=2, tokens=600):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, tokens, IN, generator=g) @ torch.randn(n, IN, IN, generator=g)
    return x.mT @ x / tokens


@pytest.mark.parametrize("name", ["int2-g64-f32", "nf3-g64-f32", "sint4-channel-f32"])
def test_refitted_scales_solve_the_normal_equations(name):
    """Without ridge: no small change of any scale lowers the output error."""
    W, spec = weights(1), parse_format(name)
    H = damped(grams(1), 0.01)
    rounded, _ = Gptq(grams(1), spec, fit="mse", damping=0.01)(W)
    fitted = refit_scales(W, H, rounded, ridge=0.0)

    def error(scales):
        size = spec.group_size or IN
        wide = scales.double().repeat_interleave(size, -1)[..., :IN]
        E = W.double() - units * wide
        return ((E @ H) * E).sum()

    ones = rounded.where(torch.tensor([False]), rounded)
    units = type(rounded)(spec, ones.codes, torch.ones_like(fitted), ones.zeros).decode().double()
    moved = (fitted - rounded.scales).abs().max()
    assert moved > 0
    g = torch.Generator().manual_seed(2)
    free = fitted != rounded.scales
    for _ in range(50):
        step = 1e-2 * fitted.abs() * torch.randn(fitted.shape, generator=g) * free
        assert error(fitted) <= error(fitted + step)


def test_codes_that_say_nothing_keep_their_scale():
    W, spec = weights(1), parse_format("int2-g64-f32")
    W[0, 3, 64:128] = 0
    rounded, _ = Gptq(grams(1), spec, fit="mse", damping=0.01)(W)
    rounded.codes[0, 3, 64:128] = rounded.zeros[0, 3, 1].to(torch.uint8)
    fitted = refit_scales(W, damped(grams(1), 0.01), rounded)
    assert fitted[0, 3, 1] == pytest.approx(rounded.scales[0, 3, 1].item(), rel=1e-3)
    assert torch.isfinite(fitted).all()


def test_one_scale_for_the_whole_tensor_is_refitted_too():
    W, spec = weights(2), parse_format("uniform2")
    H = damped(grams(), 0.01)
    rounded, _ = Gptq(grams(), spec, fit="absmax", damping=0.01)(W)
    fitted = refit_scales(W, H, rounded, ridge=0.0)
    assert fitted.shape == rounded.scales.shape == (2, 1, 1)

    def error(scales):
        E = W - type(rounded)(spec, rounded.codes, scales, rounded.zeros).decode()
        return output_error(E, H)

    assert (error(fitted) < error(rounded.scales)).all()
    for factor in (0.999, 1.001):
        assert (error(fitted) < error(fitted * factor)).all()


@pytest.mark.parametrize("size", [64, 50])
def test_equations_of_a_stack_are_those_of_each_weight(size):
    g, H = torch.Generator().manual_seed(3), grams()
    pulled, units = weights() @ H, torch.randint(-3, 4, (2, OUT, IN), generator=g).float()
    M, c = equations_at_once(pulled, H, units, size)
    for i in range(2):
        lower, own = _equations(pulled[i], H[i], units[i], size)
        torch.testing.assert_close(M[i].tril(), lower, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(M[i], M[i].mT, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(c[i], own, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_refits_all_groups_at_once_to_the_same_scales():
    W, spec = weights(), parse_format("int2-g64-f32")
    rounded, _ = Gptq(grams(), spec, fit="mse", damping=0.01)(W)
    H = damped(grams(), 0.01).float()
    there = type(rounded)(spec, *(x.cuda() for x in (rounded.codes, rounded.scales, rounded.zeros)))
    torch.testing.assert_close(
        refit_scales(W.cuda(), H.cuda(), there).cpu(),
        refit_scales(W, H, rounded),
        rtol=1e-3,
        atol=1e-4,
    )
