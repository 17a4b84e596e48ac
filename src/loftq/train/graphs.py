"""The forward and backward of a training step as one CUDA graph for each shape of batch.

A step of a small model, or of a large one on few tokens, launches thousands of kernels of a few
microseconds, and takes as long as the host needs to launch them. A graph launches them all at once.
Batches come in few shapes (`Rounded` pads them up), each captured when it has come a few times:
those first times compile kernels and warm libraries up, as a capture may not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loftq.train.errors import TrainError
from loftq.train.masks import LayerMasks

EAGER = 2
"""Times that a shape is computed kernel by kernel before it is captured."""
MOST = 8
"""Graphs that are kept; further shapes go on kernel by kernel."""
WIDTHS = 4
"""Widths that batches are padded up to."""

Batch = Mapping[str, Tensor]
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Features -> batch."""
Step = Callable[[dict[str, Tensor]], Tensor]
"""Batch -> detached loss, gradients added to those of the parameters."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    loss: Tensor

    def replay(self, batch: Batch) -> Tensor:
        for name, static in self.batch.items():
            static.copy_(batch[name], non_blocking=True)
        self.graph.replay()
        return self.loss.clone()  # the next graph may write where this one did


class StepGraphs:
    """Computes steps, from a graph wherever one is there for the shape.

    Gradients lie in buffers that stay: a graph adds to where they lay when it was captured. A
    parameter whose `.grad` is None gets its buffer back, zeroed, so that `zero_grad` works as ever.

    Buffers that are there from the first step on stand beside everything that a forward keeps. Of
    one batch a step they need not: then the first graph makes them as its backward comes to them,
    in memory that the forward had, and writes instead of adding.

    Args:
        parameters: that take gradients, on one CUDA device.
        layers: of the model, which are handed masks (`masks.layers_of`).
        accumulates: whether gradients of several batches are added up.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        layers: Iterable[nn.Module] = (),
        accumulates: bool = True,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.accumulates = accumulates
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(p) if accumulates else None for p in self.parameters
        ]
        """Buffers, None where there is none yet."""
        self.captured: dict[Any, _Captured] = {}
        self._seen: Counter[Any] = Counter()
        self._masks = LayerMasks(layers)
        self._pool: Any = None
        self._replayed = 0

    @property
    def told(self) -> dict[str, int]:
        """Batches from graphs and those computed kernel by kernel, for the summary of a run."""
        eager = self._seen.total() - self._replayed
        return {"captured": len(self.captured), "replayed": self._replayed, "eager": eager}

    def __call__(self, step: Step, batch: Batch, *, baked: Hashable = None) -> Tensor:
        """Loss of a batch, () on the device; gradients are added.

        Args:
            step: the same computation at every call, decided by the batch's shapes and `baked`.
            batch: tensors on the device, by name.
            baked: numbers of the host that the step reads; others are another graph.

        Raises:
            TrainError: the step waits for the host, or takes shapes from values.
            RuntimeError: gradients of an earlier batch are there and are not to be added to.
        """
        if not self.accumulates and any(p.grad is not None for p in self.parameters):
            raise RuntimeError(
                "gradients of an earlier batch are there: call zero_grad() between steps, or make "
                "StepGraphs with accumulates=True."
            )
        self._place_gradients()
        key = baked, *((name, tuple(t.shape), t.dtype) for name, t in batch.items())
        self._seen[key] += 1
        if key not in self.captured:
            if self._seen[key] <= EAGER or len(self.captured) == MOST:
                with self._masks.noted(key, batch):
                    return step(dict(batch))
            with self._masks.kept(key):
                self.captured[key] = self._capture(step, batch)
        self._replayed += 1
        return self.captured[key].replay(batch)

    def _place_gradients(self) -> None:
        fresh = []
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                fresh.append(gradient)
                parameter.grad = gradient
            elif parameter.grad is not gradient:
                parameter.grad = gradient.copy_(parameter.grad)
        if fresh:
            torch._foreach_zero_(fresh)

    def _capture(self, step: Step, batch: Batch) -> _Captured:
        static = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: a data loader pins memory.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            with _MadeThere(), self.parameters[0].device, capture:
                loss = step(dict(static))
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise TrainError(
                f"graphs=true: a step of this model cannot be captured ({first}). Train it with "
                "graphs=false."
            ) from error
        self._pool = self._pool or graph.pool()
        self.gradients = [p.grad for p in self.parameters]  # what this graph made is kept
        return _Captured(graph, static, loss)


class _MadeThere(TorchFunctionMode):
    """Numbers become tensors by a fill of the device, not by a copy from the host.

    transformers 5.17 makes positions and masks from such numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and isinstance(args[0], int | float):
            return torch.full((), args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Rounded:
    """A collator whose batches have few widths: padded on the right to a share of the longest.

    Args:
        collate: features -> batch.
        longest: tokens that a row may have.
        fill: what a column of tokens is filled up with, by name; other tensors stay as they are.
    """

    def __init__(self, collate: Collator, longest: int, fill: Mapping[str, int]) -> None:
        self.collate, self.longest, self.fill = collate, longest, fill
        self.multiple = -(-longest // WIDTHS)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some features."""
        batch = self.collate(features)
        for name, value in self.fill.items():
            if name in batch and batch[name].dim() > 1:  # (rows, tokens) or (rows, answers, tokens)
                width = batch[name].shape[-1]
                more = min(-width % self.multiple, max(0, self.longest - width))
                batch[name] = nn.functional.pad(batch[name], (0, more), value=value)
        return batch


def why_not(
    model: nn.Module, device: torch.device, *, processes: int, dtype: str, checkpointing: bool
) -> str:
    """Why steps of this model cannot be captured here, or ""."""
    if device.type != "cuda":
        return "graphs are a CUDA feature"
    if processes > 1:
        return "gradients of several processes are averaged while the backward runs"
    if dtype == "fp16":
        return "fp16 scales its loss anew at every step"
    drops = {name for module in model.modules() for name in _dropped(module)}
    if layers := sorted(name for name in drops if name.endswith("layerdrop")):
        return f"{layers[0]} skips other layers at every step"
    if checkpointing and drops:
        return "what checkpointing computes again would drop other values; checkpointing=false"
    return ""


def _dropped(module: nn.Module) -> list[str]:
    """Names of the probabilities above 0 by which a module drops values or layers.

    A layer of BART or an attention has no module of its own for it, but a number.
    """
    if isinstance(module, nn.Dropout):
        return ["p"] if module.p > 0 else []
    held = vars(module).items()
    return [name for name, p in held if "drop" in name and isinstance(p, float) and p > 0]
