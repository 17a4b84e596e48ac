"""TRL's trainers with what is ours: nothing leaves the machine, and the last batch is known."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from loftq.train.graphs import StepGraphs
from loftq.train.masks import MASK
from loftq.train.offload import HostInputs
from loftq.train.padding import IGNORED
from loftq.train.tiles import base_of, tiled_loss

ITEMS = "num_items_in_batch"
"""Name of what a step's loss is divided by, among the tensors of a batch."""


class Watched:
    """Before a trainer of transformers or TRL in the order of bases."""

    batch_shape = (0, 0)
    """Rows and tokens of a row, padding included, of the batch that is being computed; of a choice
    every answer is a row."""
    graphs: StepGraphs | None = None
    """Of the steps that are trained; None = kernel by kernel."""
    offload: HostInputs | None = None
    """Where checkpointing keeps its inputs; None = on the device."""
    tiled = False
    """Whether what is trained is a causal language model's loss by tiles (`train.tiles`)."""
    right_padded = False
    """Whether padding follows what is learnt, and carries no label: causal attention then needs no
    mask."""

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Forward and backward of a batch, from a graph if there is one.

        Its size is remembered for the message of a full memory. The backward runs in the thread of
        the forward: each thread that computes has a workspace of cuBLAS of its own, 32 MiB.
        """
        self.batch_shape = _rows_of_tokens(inputs["input_ids"])
        with torch.autograd.set_multithreading_enabled(False):
            return self._step(super().training_step, model, inputs, num_items_in_batch, **kwargs)  # type: ignore[misc]

    def _step(
        self, step: Any, model: Any, inputs: Any, num_items_in_batch: Any, **kwargs: Any
    ) -> Any:
        if self.graphs is None:
            return step(model, inputs, num_items_in_batch, **kwargs)
        trainer: Any = self
        batch, baked = dict(trainer._prepare_inputs(inputs)), None
        if num_items_in_batch is None or not trainer.model_accepts_loss_kwargs:
            # The loss is then divided by the batches of the step: fewer at the end of an epoch.
            baked = trainer.current_gradient_accumulation_steps
        if self.tiled and self.right_padded:
            batch.pop(MASK, None)
        if num_items_in_batch is not None:
            batch[ITEMS] = torch.as_tensor(num_items_in_batch, device=trainer.args.device)

        def computed(batch: dict[str, Any]) -> Any:
            items = batch.pop(ITEMS, None)
            return step(model, batch, items, **kwargs)

        return self.graphs(computed, batch, baked=baked)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's own loss, or the same by tiles: nats over the tokens of a step."""
        if not (self.tiled and model.training):
            own = super().compute_loss  # type: ignore[misc]
            with self.offload or nullcontext():
                return own(model, inputs, return_outputs, num_items_in_batch)
        trainer: Any = self
        with trainer.accelerator.autocast():
            total = tiled_loss(base_of(trainer.accelerator.unwrap_model(model)), inputs)
        tokens = num_items_in_batch
        if tokens is None:
            tokens = inputs["labels"][:, 1:].ne(IGNORED).sum()
        return total / torch.as_tensor(tokens, device=total.device).clamp(min=1)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for a batch that is only scored."""
        self.batch_shape = _rows_of_tokens(inputs["input_ids"])
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the card is ours (integrations/card.py)."""

    def _send_telemetry(self) -> None:
        """None: a run tells nobody about itself."""


def one_process(args: Any) -> Any:
    """The arguments with one device per process.

    With several GPUs in sight and no launcher transformers would wrap the model in DataParallel,
    which packed layers and TRL's loss do not survive; `torchrun` is the way to use them all.
    """
    args._n_gpu = min(1, args.n_gpu)
    return args


def _rows_of_tokens(ids: torch.Tensor) -> tuple[int, int]:
    """The two sizes of (rows, tokens) or (rows, answers, tokens)."""
    return ids.shape[:-1].numel(), ids.shape[-1]
