"""Running totals of a quantization, for whoever shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loftq.pipeline.plan import Batch, Plan


@dataclass
class Tally:
    """Layers done, mean errors so far and the seconds left."""

    plan: Plan
    layers: int = 0
    weights: int = 0
    plain_error: float = 0.0
    error: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _resumed: int = 0

    def add(self, batch: Batch, records: list[Mapping[str, Any]], resumed: bool) -> None:
        """Count a finished batch."""
        weights = sum(layer.weights for layer in batch.layers)
        self.layers += len(records)
        self.weights += weights
        self._resumed += weights if resumed else 0
        self.plain_error += sum(record["plain_error"] for record in records)
        self.error += sum(record["error"] for record in records)

    @property
    def mean_errors(self) -> tuple[float, float]:
        """Mean relative error (plain rounding, with the correction) over the layers so far."""
        count = max(1, self.layers)
        return self.plain_error / count, self.error / count

    @property
    def seconds_left(self) -> float:
        """At the speed so far; the plan's estimate before anything is done."""
        done = self.weights - self._resumed
        left = self.plan.weights - self.weights
        if not done:
            return self.plan.seconds * left / max(1, self.plan.weights)
        return (time.perf_counter() - self.started) * left / done
