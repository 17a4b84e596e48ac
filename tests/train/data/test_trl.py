"""TRL's trainers take prepared data as it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from loftq.train.data import DataSettings, prepare
from tiny_tokenizers import tiny

pytest.importorskip("trl")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def options(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "max_length": 64}


@pytest.mark.filterwarnings("ignore")
def test_sft_computes_the_loss_on_the_mask_and_nothing_else(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = tiny()
    path = write(tmp_path / "a.jsonl", [{"messages": turns}] * 3)
    found = prepare(path, tokenizer, DataSettings(max_length=64))
    trainer = SFTTrainer(
        model=zoo.build("llama"),
        args=SFTConfig(completion_only_loss=True, **options(tmp_path)),
        train_dataset=found.train,
        eval_dataset=found.validation,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    row, labels = found.train[0], batch["labels"][0].tolist()
    masked = zip(row["input_ids"], row["completion_mask"], strict=True)
    assert labels == [token if trained else -100 for token, trained in masked]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [True, False])
def test_dpo_sees_the_tokens_that_were_counted(tmp_path: Path, chat: bool) -> None:
    from trl import DPOConfig, DPOTrainer

    row: dict[str, Any] = {"prompt": "a", "chosen": " b", "rejected": " c"}
    if chat:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
    tokenizer = tiny()
    found = prepare(write(tmp_path / "a.jsonl", [row] * 3), tokenizer, DataSettings(max_length=64))
    trainer = DPOTrainer(
        model=zoo.build("llama"),
        ref_model=zoo.build("llama"),
        args=DPOConfig(**options(tmp_path)),
        train_dataset=found.train,
        processing_class=tokenizer,
    )
    seen = trainer.train_dataset[0]
    answers = len(seen["chosen_ids"]) + len(seen["rejected_ids"])
    assert found.counts.trained_tokens == 2 * answers
    assert found.counts.tokens == 2 * (answers + 2 * len(seen["prompt_ids"]))
    assert list(found.prompts[0].prompt_ids) == seen["prompt_ids"]
