"""Which weights the loss depends on: row and column means of the Fisher information's diagonal.

    F_ij = mean over windows of g_ij^2,   g = d loss / d W of one window

LQ-LoRA (arXiv:2311.12023, section 3.3) takes F as of rank one, so that a weighted low-rank problem
has a closed form. Only what that needs is kept, never F itself: the means of F over the inputs (one
number a row, output) and over the outputs (one a column, input). Their product over the mean of F
is the rank-one F.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loftq.calibration.accumulators import InputStatistics
from loftq.calibration.store import StatisticsStore
from loftq.checkpoint.durable import publish, write_partial

FISHER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Of one weight (out_features, in_features)."""

    rows: Tensor
    """mean_j F_ij, (out_features,) float64."""
    columns: Tensor
    """mean_i F_ij, (in_features,) float64."""


def collect_fisher(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    layers: Mapping[str, bool],
    *,
    on_loss: Callable[[int], object] = lambda done: None,
) -> dict[str, Fisher]:
    """Back-propagate each loss and sum the squares of the gradients, a weight at a time.

    No gradient outlives its own sum: beside the model one gradient and the activations of one
    window are in memory. The model's `requires_grad` flags and gradients are left as they were.

    Args:
        model: dense, in eval mode.
        losses: one per window; computes the loss on the model.
        layers: module path -> whether its weight is stored (in, out).
        on_loss: called after each with the number done.

    Raises:
        ValueError: no loss depends on a layer, or a gradient is not finite; the layer is named.
    """
    sums: dict[str, list[Tensor]] = {}
    done = 0
    with ExitStack() as cleanup:
        for parameter in model.parameters():
            cleanup.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for path, transposed in layers.items():
            weight = model.get_submodule(path).get_parameter("weight")
            cleanup.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
            weight.requires_grad_(True)
            hook = weight.register_post_accumulate_grad_hook(
                lambda weight, path=path, transposed=transposed: _add(
                    sums, path, weight, transposed
                )
            )
            cleanup.callback(hook.remove)
        for done, loss in enumerate(losses, 1):
            with torch.enable_grad():
                loss().backward()
            on_loss(done)
    return {path: _mean(path, sums.get(path), done) for path in layers}


class FisherStore(StatisticsStore):
    """The statistics of a model with its Fisher means, one file beside those of the inputs."""

    @property
    def _file(self) -> Path:
        return self.folder / "fisher.safetensors"

    def holds_fisher(self, layers: Iterable[str]) -> bool:
        """Whether the means of all these layers are there."""
        if not self._file.is_file():
            return False
        with safe_open(self._file, "pt") as file:
            return {f"{layer}.rows" for layer in layers} <= set(file.keys())

    def write_fisher(self, found: Mapping[str, Fisher]) -> None:
        """Keep the means of all layers, durably."""
        tensors = {f"{path}.rows": one.rows.cpu() for path, one in found.items()}
        tensors |= {f"{path}.columns": one.columns.cpu() for path, one in found.items()}
        about = {"loftq": json.dumps({"version": FISHER_VERSION})}
        write_partial(self._file, save(tensors, about))
        publish(self._file)

    def read(self, layer: str, kind: str, device: torch.device | str = "cpu") -> InputStatistics:
        """Statistics of a layer; of kind "fisher" the diagonal of its inputs, and its means."""
        if kind != "fisher":
            return super().read(layer, kind, device)
        with safe_open(self._file, "pt") as file:
            rows, columns = (file.get_tensor(f"{layer}.{part}") for part in ("rows", "columns"))
        inputs = super().read(layer, "diagonal", device)
        return replace(inputs, fisher_rows=rows.to(device), fisher_columns=columns.to(device))


def _add(sums: dict[str, list[Tensor]], path: str, weight: Tensor, transposed: bool) -> None:
    assert weight.grad is not None
    squares = weight.grad.double().square()
    squares = squares.mT if transposed else squares
    weight.grad = None
    now = [squares.mean(1), squares.mean(0)]
    before = sums.get(path)
    sums[path] = now if before is None else [a + b for a, b in zip(before, now, strict=True)]


def _mean(path: str, found: list[Tensor] | None, windows: int) -> Fisher:
    if found is None:
        raise ValueError(
            f"{path}: no loss depends on it, so that it has no gradient. Leave it out with "
            f'skip=["{path}"].'
        )
    rows, columns = (total / windows for total in found)
    if not (torch.isfinite(rows).all() and torch.isfinite(columns).all()):
        raise ValueError(
            f"{path}: a gradient is not finite. Run the model in float32, or choose a method that "
            "needs no gradients."
        )
    return Fisher(rows=rows, columns=columns)
