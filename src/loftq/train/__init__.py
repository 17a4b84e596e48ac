"""Training of adapters on a packed backbone.

This room bears the name of its verb, and Python has one attribute `loftq.train` for both. So the
module can be called: `loftq.train(model, data, output)` is `loftq.train.run.train`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loftq.train.config import TrainConfig
from loftq.train.errors import Diverged, OutOfMemory, TrainError
from loftq.train.listener import Briefing, Listener, Pace
from loftq.train.short import next_token_loss, tune_briefly

if TYPE_CHECKING:
    from loftq.train.result import TrainResult

__all__ = [
    "Briefing",
    "Diverged",
    "Listener",
    "OutOfMemory",
    "Pace",
    "TrainConfig",
    "TrainError",
    "next_token_loss",
    "tune_briefly",
]


class _Verb(ModuleType):
    """A module that can be called."""

    def __call__(self, *args: Any, **options: Any) -> TrainResult:
        """Fine-tune the adapter of a packed model: `help(loftq.train.run.train)`."""
        from loftq.train.run import train

        return train(*args, **options)


sys.modules[__name__].__class__ = _Verb
