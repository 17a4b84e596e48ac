"""Supervised rows: what is learnt, and packed rows that do not see each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_chat
import zoo
from loftq.train import Briefing, Listener, TrainError
from loftq.train.data import DataSettings, prepare
from loftq.train.packing import keeps_apart
from loftq.train.sft import arrange, with_labels

pytestmark = pytest.mark.compat


class Watch(Listener):
    """Keeps the briefing."""

    def ready(self, briefing: Briefing) -> None:
        self.briefing = briefing


def test_labels_are_the_learnt_tokens_and_nothing_else(model: Path, chats: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = DataSettings(max_length=48, chat_template="chatml")
    prepared = prepare(str(chats), tokenizer, settings)
    for row, made in zip(prepared.train, with_labels(prepared.train), strict=True):
        assert made["input_ids"] == row["input_ids"]
        wanted = zip(row["input_ids"], row["completion_mask"], strict=True)
        assert made["labels"] == [token if learnt else -100 for token, learnt in wanted]
    assert 0 < sum(map(sum, prepared.train["completion_mask"])) < prepared.counts.tokens


def test_packing_loses_no_token(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = tiny_chat.write_texts(tmp_path / "texts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prepared = prepare(str(texts), tokenizer, DataSettings(max_length=16))
    packed, _ = arrange(prepared, packing=True)
    assert len(packed) < len(prepared.train)
    assert sum(map(len, packed["input_ids"])) == prepared.counts.tokens
    assert max(map(len, packed["input_ids"])) <= 16
    assert [sum(row) for row in packed["seq_lengths"]] == [len(row) for row in packed["input_ids"]]


def test_the_loss_of_packed_rows_is_that_of_single_ones(
    train: Callable, out: Path, tmp_path: Path
) -> None:
    """A step on all rows: the same mean over tokens, whether they share a sequence or not."""
    texts = tiny_chat.write_texts(tmp_path / "texts.jsonl", rows=13)
    rows = {"max_length": 24, "max_steps": 1, "batch_size": 16, "gradient_accumulation": 1}
    losses = {}
    for packing in (True, False):
        options = {**rows, "packing": packing, "chat_template": None}
        result = train(out, texts, tmp_path / str(packing), **options)
        losses[packing] = result.summary["final_loss"]
    assert losses[True] == pytest.approx(losses[False], abs=2e-6)


def test_text_is_packed_by_default_and_steps_count_packed_rows(
    train: Callable, out: Path, tmp_path: Path
) -> None:
    texts, watch = tiny_chat.write_texts(tmp_path / "texts.jsonl"), Watch()
    options = {"max_length": 24, "max_steps": None, "epochs": 1, "batch_size": 1}
    result = train(
        out, texts, tmp_path / "run", listener=watch, gradient_accumulation=1, chat_template=None,
        **options,
    )  # fmt: skip
    assert any("packed" in note for note in watch.briefing.notes)
    assert result.summary["epochs"] == 1.0
    assert result.summary["steps"] < watch.briefing.prepared.counts.trained_rows


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_attention_of_transformers_keeps_packed_rows_apart(name: str) -> None:
    assert keeps_apart(zoo.build(name), zoo.VOCAB)


def test_a_model_that_ignores_positions_is_found_out() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = zoo.build("llama")

        def forward(self, input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
            return self.whole(input_ids=input_ids, **options)

    assert not keeps_apart(Blind(), zoo.VOCAB)
    assert not keeps_apart(zoo.build("gpt2").transformer.wte, zoo.VOCAB)  # takes none at all


def test_packing_is_refused_where_rows_would_see_each_other(
    train: Callable, out: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq.train.session.keeps_apart", lambda *_: False)
    with pytest.raises(TrainError, match="let packed rows see each other"):
        train(out, chats, tmp_path / "run", packing=True)
    texts = tiny_chat.write_texts(tmp_path / "texts.jsonl")
    watch = Watch()
    options = {"chat_template": None, "max_steps": 1, "listener": watch}
    train(out, texts, tmp_path / "run", **options)
    assert any("padded, not packed" in note for note in watch.briefing.notes)


def test_only_the_adapter_takes_gradients_and_blocks_are_computed_again(
    train: Callable, out: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq.train import session

    seen: dict[str, Any] = {}
    original = session.Session._train

    def spy(self: Any, trainer: Any) -> None:
        original(self, trainer)
        named = trainer.model.named_parameters()
        seen["trained"] = {name for name, p in named if p.requires_grad}
        seen["again"] = trainer.args.gradient_checkpointing_kwargs
        optimizer = trainer.optimizer.param_groups
        seen["optimized"] = sum(p.numel() for group in optimizer for p in group["params"])
        seen["count"] = self.trainable

    monkeypatch.setattr(session.Session, "_train", spy)
    train(out, chats, tmp_path / "run", max_steps=1)
    assert all("lora_" in name for name in seen["trained"])
    assert seen["optimized"] == seen["count"]
    assert seen["again"] == {"use_reentrant": False, "preserve_rng_state": True}


def test_the_device_is_checked(train: Callable, out: Path, chats: Path, tmp_path: Path) -> None:
    import loftq

    with pytest.raises(TrainError, match="device=cuda:1: give cpu or cuda"):
        loftq.train(out, chats, tmp_path / "run", device="cuda:1")
    with pytest.raises(TrainError, match="dtype=fp16: needs a GPU"):
        train(out, chats, tmp_path / "run", dtype="fp16")


def test_packages_that_are_not_here_are_named(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"needs trackio. pip install trackio"):
        train(out, chats, tmp_path / "run", report_to="trackio")


def test_checkpointing_changes_no_gradient(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    losses = [
        train(out, chats, tmp_path / f"{kept}", checkpointing=kept, learning_rate=1e-2).summary
        for kept in (True, False)
    ]
    assert losses[0]["final_loss"] == pytest.approx(losses[1]["final_loss"], abs=1e-6)
    assert torch.isfinite(torch.tensor(losses[0]["final_loss"]))
