"""Direct preference optimization (arXiv:2305.18290) on the packed base.

The loss compares the policy with a reference. For a packed model the reference is the adapter that
training starts from, never the base without an adapter: a backbone of LoftQ at T >= 2 was fitted
together with its start adapter and is garbage alone. TRL's trainer, given a PEFT model whose
adapter is called "default", freezes a copy of it under the name "ref" and uses that.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from loftq.train.trainers import Watched, one_process

if TYPE_CHECKING:
    from loftq.train.data import Prepared

REFERENCE = "ref"


class WatchedDPOTrainer(Watched, DPOTrainer):
    """DPOTrainer, watched; its checkpoints hold the policy only.

    The reference is the start again after a resume, so it need not be stored. And it must not be:
    transformers 5.17 resumes nothing but the second adapter of a checkpoint with two.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's, without the reference."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE, ignore_errors=True)


def arrange(prepared: Prepared, *, packing: bool) -> tuple[Dataset, Dataset]:
    """Training and validation rows; TRL encodes them."""
    assert not packing, "preferences are not packed"
    return prepared.train, prepared.validation


def build(
    *,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    validation: Dataset,
    arguments: dict[str, Any],
    max_length: int,
    beta: float,
    callbacks: list[Any],
    **_: Any,
) -> WatchedDPOTrainer:
    """A trainer on rows of preferences; the model's adapter as it is now is the reference.

    Args:
        model: a PEFT model; its adapter is trained.
        tokenizer: with a pad token, and a chat template where the rows are messages.
        train: rows with prompt, chosen and rejected.
        validation: held-out rows.
        arguments: from `common_arguments`.
        max_length: tokens of a prompt with its answer; longer ones are cut.
        beta: how closely the policy is held to the reference.
        callbacks: for the trainer.
    """
    chosen = arguments | {"max_length": max_length, "beta": beta}
    trainer = WatchedDPOTrainer(
        model=model,
        args=one_process(DPOConfig(**chosen)),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    assert REFERENCE in trainer.model.peft_config, "TRL compares with the base without an adapter"
    for name, parameter in trainer.model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.requires_grad_(False)
    return trainer
