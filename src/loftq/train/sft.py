"""Supervised fine-tuning: TRL's SFTTrainer on rows that are tokens already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value
from trl import SFTConfig, SFTTrainer, pack_dataset

from loftq.train.graphs import WIDTHS, StepGraphs
from loftq.train.masks import layers_of
from loftq.train.padding import IGNORED
from loftq.train.tiles import base_of, require_tiled
from loftq.train.trainers import Watched, one_process

if TYPE_CHECKING:
    from loftq.train.data import Prepared


class WatchedSFTTrainer(Watched, SFTTrainer):
    """SFTTrainer, watched."""


def arrange(prepared: Prepared, *, packing: bool) -> tuple[Dataset, Dataset]:
    """Training and validation rows with their labels, the former packed if so wanted.

    Packing joins rows to full length, best fit first (arXiv:2404.10830), and cuts none: none is
    longer than max_length.
    """
    train, validation = with_labels(prepared.train), with_labels(prepared.validation)
    if packing:
        train = pack_dataset(train, prepared.counts.max_length, "bfd")
    return train, validation


def build(
    *,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    validation: Dataset,
    arguments: dict[str, Any],
    packing: bool,
    max_length: int,
    graphs: bool,
    callbacks: list[Any],
    **_: Any,
) -> WatchedSFTTrainer:
    """A trainer on rows of `arrange`.

    Args:
        model: a PEFT model; its adapter is trained.
        tokenizer: with a pad token.
        train: training rows.
        validation: held-out rows.
        arguments: from `common_arguments`.
        packing: whether the training rows are packed, so that batches are without padding.
        max_length: tokens of the longest row.
        graphs: capture the steps (`train.graphs`).
        callbacks: for the trainer.
    """
    chosen = arguments | {
        "packing": packing,
        "eval_packing": False,
        "max_length": None,  # the rows are as they should be
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "pad_to_multiple_of": -(-max_length // WIDTHS) if graphs else None,
    }
    trainer = WatchedSFTTrainer(
        model=model,
        args=one_process(SFTConfig(**chosen)),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if graphs:
        require_tiled(base_of(model))
        trainer.graphs = StepGraphs(
            model.parameters(),
            layers=layers_of(model),
            accumulates=trainer.args.gradient_accumulation_steps > 1,
        )
        trainer.tiled = trainer.right_padded = True
    return trainer


def with_labels(rows: Dataset) -> Dataset:
    """input_ids and labels: the token itself where it is learnt, -100 where not."""

    def label(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["input_ids"], batch["completion_mask"], strict=True)
        labels = [
            [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)]
            for ids, mask in pairs
        ]
        return {"input_ids": batch["input_ids"], "labels": labels}

    # Both columns of one list type: packing compares their offsets.
    features = Features({name: List(Value("int32")) for name in ("input_ids", "labels")})
    return rows.map(
        label,
        batched=True,
        remove_columns=rows.column_names,
        features=features,
        load_from_cache_file=False,
    )
