"""Adam on a few tensors over the same batches again and again, the best iterate kept.

The loss of held-out batches is taken before the first step and after each pass; what is left in the
parameters at the end is the iterate with the smallest, so a refinement never ends behind its start
on text that it has not learned from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 0.05  # of all steps
CLIP = 1.0
BETAS = (0.9, 0.95)

Batches = tuple[Sequence[int], Sequence[int]]
"""Numbers of those to learn from, and of those held out."""
Loss = Callable[[int], Tensor]
"""Number of a batch -> its loss, a scalar with a gradient."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How to descend."""

    epochs: float
    """Passes over the training batches; 0 leaves the parameters as they are."""
    rate: float
    """Largest learning rate."""
    seed: int
    """Of the order of batches in each pass."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What became of a descent."""

    start: float
    """Mean held-out loss before the first step."""
    losses: tuple[float, ...]
    """The same after each pass."""
    seconds: float = field(compare=False)

    @property
    def best(self) -> float:
        """Held-out loss of what is kept."""
        return min((self.start, *self.losses))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready; times live apart."""
        return {"start": self.start, "losses": list(self.losses), "best": self.best}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a descent stands, after a step."""

    step: int
    steps: int
    loss: float
    """Of this step's batch."""


def descend(
    parameters: Sequence[Tensor],
    loss: Loss,
    batches: Batches,
    how: Descent,
    *,
    state: Mapping[str, Any] | None = None,
    keep: Callable[[Mapping[str, Any]], object] | None = None,
    on_step: Callable[[Progress], object] | None = None,
) -> Trajectory:
    """Minimise the mean loss over the first batches; the parameters end at their best iterate.

    Args:
        parameters: float tensors that take gradients, changed in place.
        loss: of a batch.
        batches: numbers of those to learn from, and of those held out.
        how: passes, rate, seed.
        state: what `keep` was given in an earlier run, to go on from there: the result is that of
            a run without interruption.
        keep: called after each pass but the last with a state to save.
        on_step: progress.

    Raises:
        ValueError: a loss is not finite.
    """
    begin = time.perf_counter()
    run = _Run(parameters, loss, batches, how)
    if state is None:
        run.look()
    else:
        run.restore(state)
    while run.step < run.steps:
        run.take_step(on_step)
        if run.step % len(batches[0]) == 0 or run.step == run.steps:
            run.look()
            if keep is not None and run.step < run.steps:
                keep(run.state())
    run.recall()
    start, *losses = run.seen
    return Trajectory(start=start, losses=tuple(losses), seconds=time.perf_counter() - begin)


class _Run:
    """The state of one descent."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        loss: Loss,
        batches: Batches,
        how: Descent,
    ) -> None:
        self.parameters, self.loss, self.how = list(parameters), loss, how
        self.learned, self.held = batches
        self.steps = round(how.epochs * len(self.learned))
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=how.rate, betas=BETAS, weight_decay=0.0
        )
        self.step = 0
        self.seen: list[float] = []
        self.best: list[Tensor] = []

    def take_step(self, on_step: Callable[[Progress], object] | None) -> None:
        """One batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate * self._share()
        value = self.loss(self._batch())
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.step += 1
        if on_step is not None:
            on_step(Progress(step=self.step, steps=self.steps, loss=value.item()))

    def look(self) -> None:
        """Take the held-out loss, and note the iterate if it is the best so far."""
        with torch.no_grad():
            values = [self.loss(number).item() for number in self.held]
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            raise ValueError(
                f"the loss became {mean} after {self.step} of {self.steps} steps at rate "
                f"{self.how.rate:g}. Run the model in float32, or leave the refinement out with "
                "refine=none."
            )
        if not self.seen or mean < min(self.seen):
            self.best = [p.detach().clone() for p in self.parameters]
        self.seen.append(mean)

    def recall(self) -> None:
        """Put the best iterate into the parameters."""
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
                parameter.grad = None

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on."""
        return {
            "step": self.step,
            "seen": list(self.seen),
            "best": self.best,
            "parameters": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.step, self.seen = state["step"], list(state["seen"])
        self.best = [b.to(p.device) for b, p in zip(state["best"], self.parameters, strict=True)]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def _share(self) -> float:
        """Of the largest rate, at this step: a warm-up, then a cosine to zero."""
        warm = max(1.0, WARM_UP * self.steps)
        return (
            min(1.0, (self.step + 1) / warm)
            * 0.5
            * (1 + math.cos(math.pi * self.step / self.steps))
        )

    def _batch(self) -> int:
        """Each pass takes all batches in an order of its own."""
        epoch, place = divmod(self.step, len(self.learned))
        generator = torch.Generator().manual_seed(self.how.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.learned), generator=generator)
        return self.learned[int(order[place])]
