"""What stops a training run for a reason that its user can mend."""

from __future__ import annotations


class TrainError(ValueError):
    """A run that cannot begin or go on; says why and what to do."""


class Diverged(TrainError):
    """A loss that is not a number, or infinite."""


class OutOfMemory(TrainError):
    """The device's memory was not enough; says what filled it and what would save most."""
