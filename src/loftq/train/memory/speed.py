"""A rough time per token, from the work in it; marked as an estimate wherever it is shown.

A forward takes 2 operations per weight and token, a backward to the inputs 2, and with
checkpointing the forward is done twice: 6 in all (4 without). Attention adds its scores and the
adapters their share; a packed weight is made dense once per pass, which short steps feel.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from loftq.train.memory.predict import DTYPES, TrainingSettings
from loftq.train.memory.subject import Subject

ASSUMED = {"cpu": 4e10, "cuda": 2e13}
"""Operations a second where the device is not here to be timed: two CPU cores, a mid-range card."""
REACHED = 0.4
"""Share of the speed of a large matrix product that training reaches as a whole."""


@dataclass(frozen=True)
class Pace:
    """Time of training."""

    seconds_per_token: float
    basis: str
    """What the figure rests on."""

    def hours(self, tokens: int) -> float:
        """Hours for so many tokens."""
        return self.seconds_per_token * tokens / 3600


def operations_per_token(subject: Subject, settings: TrainingSettings) -> float:
    """Floating-point operations of a training step per token."""
    weights = sum(prod(w.info.shape) for w in subject.weights if w.rank)
    head = subject.vocabulary * subject.hidden
    passes = 6 if settings.checkpointing else 4
    adapters = 6 * subject.adapter_parameters
    scores = 2 * passes * subject.blocks * subject.hidden * settings.length / 2
    return passes * weights + 6 * head + adapters + scores


def pace(subject: Subject, settings: TrainingSettings) -> Pace:
    """Seconds per token on this machine's device, or on an assumed one where there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        rate = ASSUMED["cuda"]
        basis = f"assumes a card that reaches {rate:.0e} operations a second"
    else:
        rate = REACHED * product_speed(settings.device, settings.dtype)
        basis = f"{REACHED:.0%} of the speed of a matrix product timed here"
    return Pace(operations_per_token(subject, settings) / rate, basis)


@cache
def product_speed(device: str, dtype: str) -> float:
    """Operations a second of a square matrix product, the best of three."""
    size = 4096 if device == "cuda" else 768
    a = torch.ones(size, size, dtype=DTYPES[dtype], device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
