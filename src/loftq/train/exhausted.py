"""What to say when the device's memory was not enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loftq.train.errors import OutOfMemory

if TYPE_CHECKING:
    from loftq.train.session import Session


def explain_memory(trainer: Any, session: Session) -> OutOfMemory:
    """The error with the size of the batch that did not fit and what would save most."""
    where = f"step {trainer.state.global_step + 1}"
    batch = f"{trainer.batch_rows} rows, {trainer.batch_tokens:,} tokens with padding"
    return OutOfMemory(f"{where}: out of memory on a batch of {batch}.")
