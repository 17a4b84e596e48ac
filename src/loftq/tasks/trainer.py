"""transformers' Trainer with the metric of a task beside every validation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from loftq.train import prepare
from loftq.train.graphs import StepGraphs
from loftq.train.masks import layers_of
from loftq.train.tiles import base_of, require_tiled
from loftq.train.trainers import Watched, one_process

Score = Callable[[], Mapping[str, float]]
"""Metrics of the model as it is on the rows held out."""


Trained = TypeVar("Trained", bound="TaskTrainer")


class Features(Dataset):
    """Features in memory."""

    def __init__(self, features: Sequence[Mapping[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.features[index]


class TaskTrainer(Watched, Trainer):
    """Trainer, watched; `score` adds metrics to those of a validation."""

    score: Score | None = None
    fused = False
    """Whether the model gives log-probabilities of labels without logits of the vocabulary."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss, or the same from a fused head: nats over the tokens of a step."""
        if not self.fused or (self.tiled and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(tokens).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss on the held-out features, then the metrics of the task on the held-out rows."""
        found = super().evaluation_loop(*args, **kwargs)
        if self.score is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            scores = self.score()
            found.metrics.update({f"{prefix}_{name}": value for name, value in scores.items()})
        return found


def build(
    kind: type[Trained],
    *,
    model: Any,
    tokenizer: Any,
    train: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    arguments: dict[str, Any],
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    best: str | None,
    by_token: bool,
    score: Score | None,
    callbacks: list[Any],
    graphs: bool = False,
) -> Trained:
    """A trainer on encoded features.

    Args:
        kind: TaskTrainer, or a subclass.
        model: what is trained takes gradients.
        tokenizer: of the model.
        train: features to train on.
        validation: features of the rows held out.
        arguments: from `train.arguments.common_arguments`.
        collate: features -> batch.
        by_token: whether the model's own loss divides by the tokens of all batches of a step. The
            Trainer takes that for granted where a forward takes any keyword, and many models with
            a head take it and do nothing with it.
        best: metric that names the best checkpoint; None = the validation loss.
        score: metrics at a validation; None = the loss alone.
        callbacks: for the trainer.
        graphs: capture the steps (`train.graphs`).
    """
    chosen = arguments | {
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "metric_for_best_model": "eval_loss" if best is None else f"eval_{best}",
        "greater_is_better": best is not None,
        "include_num_input_tokens_seen": "non_padding",
        "label_names": [name for name in train[0] if name.endswith(("labels", "positions"))],
    }
    trainer = kind(
        model=model,
        args=one_process(TrainingArguments(**chosen)),
        train_dataset=Features(train),
        eval_dataset=Features(validation),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.score = score
    trainer.model_accepts_loss_kwargs = by_token and trainer.model_accepts_loss_kwargs
    if trainer.model_accepts_loss_kwargs:
        base = base_of(model)
        trainer.fused, trainer.tiled = prepare.add_fused_head(base), graphs
        if graphs:
            require_tiled(base)
    if graphs:
        trainer.graphs = StepGraphs(
            model.parameters(),
            layers=layers_of(model),
            accumulates=trainer.args.gradient_accumulation_steps > 1,
        )
        trainer.right_padded = tokenizer.padding_side == "right"
    return trainer
