"""Preference training: the reference is the start adapter, and the loss begins at ln 2."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq.integrations.metrics import read_metrics
from loftq.train import Briefing, Listener, Pace, TrainError
from loftq.train.data import DataSettings, prepare
from loftq.train.dpo import REFERENCE, arrange, build

pytestmark = pytest.mark.compat


@pytest.fixture
def trainer(out: Path, preferences: Path, tmp_path: Path) -> Any:
    """A DPO trainer on a 2-bit backbone whose start adapter is not zero."""
    from transformers import AutoTokenizer

    import loftq
    from loftq.train.arguments import common_arguments
    from loftq.train.config import TrainConfig

    model = loftq.load(out, trainable=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prepared = prepare(str(preferences), tokenizer, DataSettings(max_length=48))
    rows, held = arrange(prepared, packing=False)
    config = TrainConfig(max_steps=4, learning_rate=1e-2, eval_steps=2)
    arguments = common_arguments(
        config,
        config.steps(len(rows)),
        checkpoints=tmp_path / "checkpoints",
        dtype="fp32",
        device=torch.device("cpu"),
        resumed=False,
    )
    return build(
        model=model,
        tokenizer=tokenizer,
        train=rows,
        validation=held,
        arguments=arguments,
        max_length=48,
        beta=0.1,
        callbacks=[],
    )


def log_probability(model: Any, ids: list[int], prompt: int) -> float:
    """Of the tokens after the prompt, without any of TRL's code."""
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=row[:, :-1]).logits[0].double().log_softmax(-1)
    return float(logits.gather(1, row[0, 1:, None])[prompt - 1 :].sum())


def test_the_reference_is_the_start_and_not_the_bare_backbone(trainer: Any) -> None:
    model, ids = trainer.model.eval(), [10, 11, 12, 13, 2]
    policy = log_probability(model, ids, 2)
    model.set_adapter(REFERENCE)
    reference = log_probability(model, ids, 2)
    model.set_adapter("default")
    with model.disable_adapter():
        bare = log_probability(model, ids, 2)
    assert reference == policy
    assert abs(bare - policy) > 1e-4


def test_only_the_policy_is_trained(trainer: Any) -> None:
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert names
    assert all(".default." in name for name in names)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if f".{REFERENCE}." in n}
    trainer.train()
    assert before
    for name, tensor in before.items():
        assert torch.equal(trainer.model.get_parameter(name), tensor)


def test_the_first_loss_is_ln_2_and_it_falls(
    train: Callable, out: Path, preferences: Path, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e-2, "chat_template": None}
    train(out, preferences, tmp_path / "run", **options)
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    assert found.validation[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.train[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.train[-1]["loss"] < math.log(2) - 1e-4
    assert found.train[-1]["reward_margin"] > 0
    names = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert names
    assert not any(REFERENCE in name.split(".") for name in names)
    assert not (tmp_path / "run/adapter" / REFERENCE).exists()


def test_it_goes_on_against_the_same_reference(
    train: Callable, out: Path, preferences: Path, tmp_path: Path
) -> None:
    class Stop(Listener):
        def step(self, row: Mapping[str, Any], pace: Pace) -> None:
            if row["step"] == 3:
                raise KeyboardInterrupt

    options = {"learning_rate": 1e-2, "chat_template": None, "eval_steps": 2, "samples": 0}
    whole = train(out, preferences, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(out, preferences, tmp_path / "run", listener=Stop(), **options)
    resumed = train(out, preferences, tmp_path / "run", **options)
    assert resumed.resumed == 2
    assert resumed.summary["final_loss"] == pytest.approx(whole.summary["final_loss"], abs=1e-6)


def test_the_algorithm_is_said(
    train: Callable, out: Path, preferences: Path, tmp_path: Path
) -> None:
    class Notes(Listener):
        def ready(self, briefing: Briefing) -> None:
            self.notes = briefing.notes
            self.rate = briefing.config.learning_rate

    listener = Notes()
    train(out, preferences, tmp_path / "run", listener=listener, chat_template=None, max_steps=1)
    assert "preference optimization" in listener.notes[0]
    assert listener.rate == 1e-5
    assert json.loads((tmp_path / "run/data.json").read_text())["format"] == "preference"


def test_preferences_are_not_packed(
    train: Callable, out: Path, preferences: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="preferences come in pairs"):
        train(out, preferences, tmp_path / "run", chat_template=None, packing=True)
