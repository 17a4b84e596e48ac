"""Supervised fine-tuning: TRL's SFTTrainer on rows that are tokens already."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from loftq.train.trainers import Watched, one_process

IGNORED = -100


class WatchedSFTTrainer(Watched, SFTTrainer):
    """SFTTrainer, watched."""


def build(
    *,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    validation: Dataset | None,
    arguments: dict[str, Any],
    packing: bool,
    max_length: int,
    callbacks: list[Any],
    **_: Any,
) -> WatchedSFTTrainer:
    """A trainer on rows of input_ids and completion_mask (1 = the token is learnt).

    Args:
        model: a PEFT model; its adapter is trained.
        tokenizer: with a pad token.
        train: training rows, none longer than max_length.
        validation: held-out rows, or None.
        arguments: from `common_arguments`.
        packing: join short rows (best fit, decreasing) up to max_length.
        max_length: tokens of a packed row.
        callbacks: for the trainer.
    """
    chosen = arguments | {
        "packing": packing,
        "eval_packing": False,
        "packing_strategy": "bfd",
        "max_length": max_length if packing else None,
        # Our rows have their labels, so there is nothing to prepare unless they are to be packed.
        "dataset_kwargs": {"skip_prepare_dataset": not packing},
    }
    return WatchedSFTTrainer(
        model=model,
        args=one_process(SFTConfig(**chosen)),
        train_dataset=with_labels(train),
        eval_dataset=None if validation is None else with_labels(validation),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def with_labels(rows: Dataset) -> Dataset:
    """input_ids and labels: the token itself where it is learnt, -100 where not."""

    def label(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["input_ids"], batch["completion_mask"], strict=True)
        labels = [
            [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)]
            for ids, mask in pairs
        ]
        return {"labels": labels}

    labelled = rows.map(label, batched=True, load_from_cache_file=False)
    return labelled.select_columns(["input_ids", "labels"])
