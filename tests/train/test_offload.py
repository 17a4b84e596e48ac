"""Inputs of blocks in host memory: the same gradients, less on the device, and who is refused."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loftq
import zoo
from loftq.train import offload
from loftq.train.config import TrainConfig
from loftq.train.errors import TrainError
from loftq.train.forecast import forecast
from loftq.train.offload import NEWEST, HostInputs, why_not_offloaded
from loftq.train.prepare import prepare_for_training
from tolerances import FLOAT32_SOLVE

SHORT = {"max_length": 48, "chat_template": "chatml", "sample_tokens": 4, "max_steps": 4}
BLOCKS, SHAPE = 6, (2, 256, 512)
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"checkpointing": False}, "more than their inputs"),
        ({"graphs": True}, "a graph copies nothing"),
        ({}, ""),
    ],
)
def test_where_it_is_refused(change: dict, why: str) -> None:
    chosen = {"checkpointing": True, "graphs": False, **change}
    found = why_not_offloaded(CUDA, **chosen)
    assert why in found
    assert bool(found) == bool(change)


def test_a_cpu_is_refused_with_the_remedy(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"offload=true: the host is .* Leave it out"):
        train(out, chats, tmp_path / "run", max_steps=1, offload=True)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_full_memory_proposes_it_unless_steps_are_captured(out: Path, graphs: bool) -> None:
    config = TrainConfig(graphs=graphs)
    expected = forecast(
        out, config, kind="sft", longest=400, packing=False, dtype="bf16", device="cuda"
    )
    assert ("offload" in expected.without) == graphs
    assert " saves " in str(expected.exhausted(1, 4, 400))


def _blocks(device: torch.device) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(SHAPE[-1], SHAPE[-1]), nn.Tanh()) for _ in range(BLOCKS)]
    return nn.ModuleList(layers).to(device)


def _run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def test_gradients_are_the_same_step_after_step(device: torch.device) -> None:
    blocks, host = _blocks(device), HostInputs(device)
    for _ in range(3):
        x = torch.randn(SHAPE, device=device)
        blocks.zero_grad()
        _run(blocks, x).square().mean().backward()
        wanted = [p.grad.clone() for p in blocks.parameters()]
        blocks.zero_grad()
        with host:
            loss = _run(blocks, x).square().mean()
        assert host.host_bytes == (BLOCKS + 1) * x.nbytes  # and what is squared
        assert host.device_bytes == NEWEST * x.nbytes
        with torch.autograd.set_multithreading_enabled(False):  # as in training
            loss.backward()
        assert host.device_bytes == 0
        assert all(torch.equal(p.grad, w) for p, w in zip(blocks.parameters(), wanted, strict=True))


def test_in_the_backward_the_input_before_is_there_and_no_other(device: torch.device) -> None:
    blocks, host = _blocks(device), HostInputs(device)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    there = []
    for block in blocks:
        block.register_full_backward_hook(lambda *_: there.append(host.device_bytes // x.nbytes))
    with host:
        loss = _run(blocks, x).square().mean()
    loss.backward()
    assert there == [1] * (BLOCKS - 1) + [0]


def test_the_first_backward_raises_if_an_input_came_back_changed(device: torch.device) -> None:
    blocks, host = _blocks(device), HostInputs(device)
    x = torch.randn(SHAPE, device=device)
    with host:
        loss = _run(blocks, x).square().mean()
    if device.type == "cuda":
        torch.cuda.synchronize()
    host.kept[1].host[0, 0, 0] += 1
    with pytest.raises(TrainError, match=r"the input of a block came back .* changed"):
        loss.backward()


def test_only_the_first_step_is_checked() -> None:
    device = torch.device("cpu")
    blocks, host = _blocks(device), HostInputs(device)
    for checked in (True, False):
        with host:
            loss = _run(blocks, torch.randn(SHAPE)).square().mean()
        assert all((one.checksum is not None) == checked for one in host.kept)
        loss.backward()


def test_logits_and_small_tensors_stay_where_they_are() -> None:
    host = HostInputs(torch.device("cpu"))
    weight = torch.ones(SHAPE, requires_grad=True)
    wide = torch.ones((*SHAPE[:2], 2 * SHAPE[-1]), requires_grad=True)
    small = torch.ones((1, 1, 8), requires_grad=True)
    with host:
        total = weight.square().sum() + wide.square().sum() + small.square().sum()
    assert host.host_bytes == weight.nbytes
    total.backward()
    assert all(bool((t.grad == 2).all()) for t in (weight, wide, small))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_in_the_training_layer_gets_the_same_gradients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    torch.manual_seed(0)
    model = loftq.quantize_model(zoo.build("llama"), rank=4, method="qlora").to(device)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1)
    prepare_for_training(model)
    host, ids = HostInputs(device), zoo.tokens().to(device)
    found = []
    for context in (nullcontext(), host, host):
        model.zero_grad()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(host.kept) == zoo.BLOCKS + 1  # and the input of the last norm
    assert found[0]
    for again in found[1:]:
        for gradient, wanted in zip(again, found[0], strict=True):
            assert (gradient - wanted).norm() <= FLOAT32_SOLVE * wanted.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["chats", "preferences"])
def test_a_run_is_the_run_without(
    kind: str,
    out: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    data, losses = request.getfixturevalue(kind), {}
    for kept in (False, True):
        run = tmp_path / f"run-{kept}"
        loftq.train(out, data, run, device="cuda", offload=kept, **SHORT)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[kept] = [row["loss"] for row in rows if "loss" in row]
    assert rows[-1]["summary"]["offload"]["host_bytes"] > 0
    assert len(losses[True]) == SHORT["max_steps"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


@pytest.mark.gpu
def test_two_inputs_take_memory_of_the_device() -> None:
    blocks, host = _blocks(CUDA), HostInputs(CUDA)
    x = torch.randn(SHAPE, device=CUDA)
    _run(blocks, x).sum().backward()  # workspaces
    taken = []
    for context in (nullcontext(), host):
        before = torch.cuda.memory_allocated()
        with context:
            y = _run(blocks, x)
        taken.append(torch.cuda.memory_allocated() - before)
        del y
    assert taken[0] - taken[1] >= (BLOCKS - 1 - NEWEST) * x.nbytes
