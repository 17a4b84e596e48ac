"""Training held near its start: the loss has a term kl * KL(model || start).

The paper of LoRA ensembles (arXiv:2310.00035) regularises members towards the predictions before
any tuning. A packed backbone alone is not that model, so that the reference is a frozen copy of the
start adapter and of the head beside it. A fresh head's predictions are nearly uniform, and the term
is then a penalty on confidence.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from loftq.integrations.members import PREDICTED
from loftq.tasks.trainer import TaskTrainer
from loftq.train.errors import TrainError
from loftq.train.padding import IGNORED

TRAINED, REFERENCE = "default", "start"


class AnchoredTrainer(TaskTrainer):
    """TaskTrainer with the term; validation losses are without it."""

    kl = 0.0
    """Weight of the term; the divergence is in nats a prediction."""

    def anchor(self, kl: float) -> None:
        """Keep the adapter as it is now for the reference, and weigh the term by `kl`.

        Raises:
            TrainError: steps of a loss by token are to be captured.
        """
        if self.graphs is not None and self.tiled:
            raise TrainError(
                "graphs=true: kl is taken over the tokens that are learnt, and the host waits to "
                "hear which. Leave one of the two out."
            )
        self.kl = kl
        self.fused = self.tiled = False  # they give no probabilities of other tokens
        model: Any = self.model
        state = get_peft_model_state_dict(model, adapter_name=TRAINED)
        model.add_adapter(REFERENCE, model.peft_config[TRAINED])
        set_peft_model_state_dict(model, state, adapter_name=REFERENCE)
        _choose(model, TRAINED)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The task's loss, plus the term where it is trained."""
        if not self.kl or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        inner = self.accelerator.unwrap_model(model)
        with torch.no_grad(), _as_it_was(inner):
            before = model(**inputs)
        shift = 0 if getattr(inner.config, "is_encoder_decoder", False) else 1
        total, count = divergence(outputs, before, inputs.get("labels"), shift=shift)
        term = self.kl * total / (count if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            term = term * self.accelerator.num_processes  # gradients are averaged over processes
        loss = loss + term
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; the reference is gone afterwards, so nothing counts or saves it."""
        found = super().train(*args, **kwargs)
        if self.kl:
            model: Any = self.model
            model.delete_adapter(REFERENCE)
            self.kl = 0.0
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Without the reference, which is the start again after a resume."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE, ignore_errors=True)


def divergence(
    outputs: Any, before: Any, labels: Tensor | None, *, shift: int
) -> tuple[Tensor, int]:
    """Sum over predictions of KL(model || start), nats, and how many predictions there are.

    Args:
        outputs: of the model, with logits (rows, classes), (rows, tokens, vocabulary), or the
            start and end of a span.
        before: the same from the start.
        labels: of a sequence they say which tokens are learnt.
        shift: places that they stand ahead of the logits that predict them: 1 in a decoder alone.
    """
    total, count = torch.zeros((), device=next(iter(outputs.values())).device), 0
    for name in PREDICTED:
        if outputs.get(name) is None:
            continue
        now, then = (_learnt(found[name], labels, shift) for found in (outputs, before))
        p, q = now.float().log_softmax(-1), then.float().log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
        count += len(p)
    return total, max(1, count)


def _learnt(logits: Tensor, labels: Tensor | None, shift: int) -> Tensor:
    """(predictions, classes)."""
    if logits.dim() == 2:
        return logits
    assert labels is not None, "a sequence says what is learnt"
    return logits[:, : logits.shape[1] - shift][labels[:, shift:] != IGNORED]


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Within, the model is the start; dropout as in training would be noise."""
    model.set_adapter(REFERENCE)
    model.eval()
    try:
        yield
    finally:
        _choose(model, TRAINED)
        model.train()


def _choose(model: Any, name: str) -> None:
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        if f".{REFERENCE}." in key:
            parameter.requires_grad_(False)
