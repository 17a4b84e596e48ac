"""Inputs of blocks in host memory: the same gradients, less on the device, and who is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loftq.train.errors import TrainError
from loftq.train.offload import NEWEST, HostInputs, why_not_offloaded

BLOCKS, SHAPE = 6, (2, 512, 1024)
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"checkpointing": False}, "more than their inputs"),
        ({"graphs": True}, "a graph copies nothing"),
        ({"kind": "preference"}, "only supervised"),
        ({}, ""),
    ],
)
def test_where_it_is_refused(change: dict, why: str) -> None:
    chosen = {"kind": "sft", "checkpointing": True, "graphs": False, **change}
    found = why_not_offloaded(CUDA, **chosen)
    assert why in found
    assert bool(found) == bool(change)


def test_a_cpu_is_refused_with_the_remedy(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"offload=true: the host is .* Leave it out"):
        train(out, chats, tmp_path / "run", max_steps=1, offload=True)


def _blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(SHAPE[-1], SHAPE[-1]), nn.Tanh()) for _ in range(BLOCKS)]
    return nn.ModuleList(layers).cuda()


def _run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


@pytest.mark.gpu
def test_gradients_are_the_same_step_after_step() -> None:
    blocks = _blocks()
    host = HostInputs(CUDA)
    for _ in range(3):
        x = torch.randn(SHAPE, device=CUDA)
        blocks.zero_grad()
        _run(blocks, x).square().mean().backward()
        wanted = [p.grad.clone() for p in blocks.parameters()]
        blocks.zero_grad()
        with host:
            loss = _run(blocks, x).square().mean()
        assert host.host_bytes == (BLOCKS + 1) * x.nbytes  # and what is squared
        loss.backward()
        assert all(torch.equal(p.grad, w) for p, w in zip(blocks.parameters(), wanted, strict=True))


@pytest.mark.gpu
def test_two_inputs_are_on_the_device() -> None:
    blocks, host = _blocks(), HostInputs(CUDA)
    x = torch.randn(SHAPE, device=CUDA)
    _run(blocks, x).sum().backward()  # workspaces
    taken = []
    for context in (None, host):
        before = torch.cuda.memory_allocated()
        if context is None:
            y = _run(blocks, x)
        else:
            with context:
                y = _run(blocks, x)
        taken.append(torch.cuda.memory_allocated() - before)
        del y
    assert taken[0] - taken[1] >= (BLOCKS - 1 - NEWEST) * x.nbytes
