"""TRL's trainers with what is ours: nothing leaves the machine, and the last batch is known."""

from __future__ import annotations

from typing import Any


class Watched:
    """Before a TRL trainer in the order of bases."""

    batch_shape = (0, 0)
    """Rows and tokens of a row, padding included, of the batch that is being computed."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember the size of the batch, for the message of a full memory."""
        self.batch_shape = tuple(inputs["input_ids"].shape)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for a batch that is only scored."""
        self.batch_shape = tuple(inputs["input_ids"].shape)
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
