"""Training of adapters on a packed backbone."""

from loftq.train.short import Diverged, next_token_loss, tune_briefly

__all__ = ["Diverged", "next_token_loss", "tune_briefly"]
