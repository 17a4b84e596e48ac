import pytest
import torch

from loftq.formats import decode_scales, encode_scales, round_trip_scales

UNIT = torch.tensor([0.0, 1.0]).view(torch.uint8)  # nested constants: no offset, absmax 1


def scales(out_features, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.02 + 0.01 * torch.rand(out_features, groups, generator=generator)


@pytest.mark.parametrize("coding", ["dq", "f16", "bf16", "f32"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 9)])
def test_storing_decoded_scales_again_is_idempotent(coding, shape):
    first = decode_scales(*encode_scales(scales(*shape), coding), coding)
    stack = round_trip_scales(scales(*shape)[None], coding)
    assert torch.equal(stack[0], first)
    relative = ((first - scales(*shape)) / scales(*shape)).abs().max()
    assert relative < {"dq": 0.02, "f16": 1e-3, "bf16": 8e-3, "f32": 1e-9}[coding]


@pytest.mark.parametrize("coding", ["dq", "f16", "bf16", "f32"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (131, 33)])
def test_a_stack_is_coded_matrix_by_matrix(coding, shape):
    stack = torch.stack([10.0**seed * scales(*shape, seed) for seed in range(3)])
    alone = [decode_scales(*encode_scales(one, coding), coding) for one in stack]
    assert torch.equal(round_trip_scales(stack, coding), torch.stack(alone))


def test_nested_coding_equals_bitsandbytes_to_the_bit():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    absmax = scales(64, 16)
    codes, constants = encode_scales(absmax, "dq")
    assert constants is not None
    offset, *runs = constants.view(torch.float32).tolist()
    flat = absmax.flatten() - absmax.mean()
    theirs, state = functional.quantize_blockwise(flat, blocksize=256)
    assert offset == absmax.mean().item()
    assert runs == state.absmax.tolist()
    # Its CPU rounding misses the nearest entry about once in a thousand; ours never does.
    table = decode_scales(torch.arange(256, dtype=torch.uint8)[None], UNIT, "dq")[0]
    unit = flat / state.absmax.repeat_interleave(256)
    ours, other = ((unit - table[c.flatten().long()]).abs() for c in (codes, theirs))
    assert (ours <= other).all()
    assert (codes.flatten() != theirs).float().mean() < 5e-3
    decoded = functional.dequantize_blockwise(theirs, state) + absmax.mean()
    stored = theirs.view(codes.shape)
    assert torch.equal(decode_scales(stored, constants, "dq").flatten(), decoded)
