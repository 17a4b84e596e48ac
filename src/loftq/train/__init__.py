"""Training of adapters on a packed backbone."""

from loftq.train.config import TrainConfig
from loftq.train.errors import Diverged, OutOfMemory, TrainError
from loftq.train.listener import Briefing, Listener, Pace
from loftq.train.short import next_token_loss, tune_briefly

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
