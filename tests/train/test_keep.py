"""Blocks that checkpointing leaves alone: the same gradients, and not computed twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq
import zoo
from loftq.train.config import TrainConfig
from loftq.train.errors import TrainError
from loftq.train.keep import keep_blocks
from loftq.train.memory import TrainingSettings, predict, subject_of_output
from loftq.train.prepare import prepare_for_training
from loftq.train.sitting import Sitting
from tolerances import FLOAT32_SOLVE


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_kept_blocks_are_computed_once_and_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    model: Any = loftq.quantize_model(zoo.build("llama"), rank=4, method="qlora")
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1)
    prepare_for_training(model)
    base, ids, calls = model.get_base_model(), zoo.tokens(), []
    for index, block in enumerate(base.model.layers):
        block.input_layernorm.register_forward_pre_hook(lambda *_, i=index: calls.append(i))
    found = []
    for blocks in (0, 1):
        keep_blocks(base, blocks)
        model.zero_grad()
        calls.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        last = zoo.BLOCKS - 1
        assert calls.count(last) == (1 if blocks else 2)
        assert calls.count(0) == 2
    for gradient, wanted in zip(*found, strict=True):
        assert (gradient - wanted).norm() <= FLOAT32_SOLVE * wanted.norm()


def test_a_run_keeps_them(train: Callable, out: Path, chats: Path, tmp_path: Path) -> None:
    wanted = train(out, chats, tmp_path / "all", checkpointing=True)
    found = train(out, chats, tmp_path / "kept", checkpointing=True, keep_blocks=1)
    losses = [run.summary["final_loss"] for run in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert sum(found.memory["predicted"].values()) > sum(wanted.memory["predicted"].values())


def test_more_blocks_than_there_are_are_refused_before_any_work(
    train: Callable, out: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sitting, "_samples_before", lambda _: pytest.fail("too late"))
    refused = rf"keep_blocks=99: the model has {zoo.BLOCKS} blocks .* Choose at most {zoo.BLOCKS}"
    with pytest.raises(TrainError, match=refused):
        train(out, chats, tmp_path / "run", keep_blocks=99)
    subject = subject_of_output(out)
    with pytest.raises(TrainError, match=refused):
        predict(subject, TrainingSettings(keep_blocks=99))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"checkpointing": False}, "every block keeps"),
        ({"offload": True}, "Choose one of them"),
        ({"keep_blocks": -1}, "at least 0"),
    ],
)
def test_where_it_means_nothing_it_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TrainConfig(**{"keep_blocks": 2, **change})
