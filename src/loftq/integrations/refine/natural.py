"""Natural-gradient steps of the whole model's loss, block after block.

For one block at a time the layers' inputs, output gradients and weight gradients are measured on
the first windows of the text, with all blocks before it stepped already (Align-then-Correct
measures anew for each block). All layers of the block then take one step together. Where that does
not lower the loss of the held-out windows, the step is halved, and in the end left out: no block
ends behind its start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loftq.integrations.refine.passage import first
from loftq.integrations.refine.sitting import Sitting
from loftq.integrations.refine.student import Student, pieces_of
from loftq.integrations.refine.whole import model_loss
from loftq.lowrank import LowRank
from loftq.ops.precision import full_float32
from loftq.refine import NaturalStep, Stage, Trajectory

WINDOWS = 16
"""That statistics are measured on; the paper takes 16 x 512 tokens."""
SHARES = (1.0, 0.5, 0.25)
"""Of the trust, until the held-out loss falls."""


@dataclass
class Curvature:
    """Sums over the tokens that one layer has read."""

    H: Tensor
    """Of x x^T, (in, in)."""
    Hz: Tensor
    """Of g g^T, (out, out)."""
    G: Tensor
    """Of g x^T, (out, in): the gradient of the loss by the weight."""
    tokens: int = 0

    def add(self, x: Tensor, g: Tensor) -> None:
        """Inputs and gradients by outputs of some tokens, (tokens, features).

        Tokens that the loss does not depend on, padding above all, count nowhere.
        """
        seen = g.abs().amax(-1) > 0
        x, g = x[seen].float(), g[seen].float()
        self.H.addmm_(x.mT, x)
        self.Hz.addmm_(g.mT, g)
        self.G.addmm_(g.mT, x)
        self.tokens += len(x)


def refine_natural(stage: Stage, student: Student, sitting: Sitting) -> None:
    """Carry out a stage of scope natural; blocks that an earlier process finished are taken over.

    Raises:
        ValueError: too little text, or a gradient that is not finite.
    """
    pieces, (learned, held) = pieces_of(sitting.windows.ids, sitting.windows.mask, stage.batch)
    loss = model_loss(stage, student, sitting, pieces)
    few = learned[: max(1, WINDOWS // len(pieces[0][0]))]
    with student.whole(max(mask.numel() for _, mask in pieces)), full_float32():
        for block in student.blocks:
            if not student.adapted(block) or sitting.take_over(block, student.adapter(block)):
                continue
            stepped = _Block(student, block, stage.rate, loss, (few, held))
            sitting.settle(block, student.adapter(block), stepped.go(round(stage.epochs)))


class _Block:
    """The adapted layers of one block, and the loss that they step down."""

    def __init__(
        self,
        student: Student,
        block: str,
        trust: float,
        loss: Callable[[int], Tensor],
        batches: tuple[Sequence[int], Sequence[int]],
    ) -> None:
        self.layers = {path: student.module.get_submodule(path) for path in student.adapted(block)}
        self.student, self.block, self.trust, self.loss = student, block, trust, loss
        self.learned, self.held = batches

    def go(self, steps: int) -> Trajectory:
        """That many steps, the best of each kept."""
        begin, losses = time.perf_counter(), []
        start = now = self.held_out()
        for _ in range(steps):
            before = {path: _factors(layer) for path, layer in self.layers.items()}
            known = self.measure()
            steps_of = {path: NaturalStep(x.G, x.H, x.Hz) for path, x in known.items()}
            for share in SHARES:
                for path, layer in self.layers.items():
                    _put(layer, steps_of[path].after(before[path], trust=share * self.trust))
                losses.append(self.held_out())
                if losses[-1] < now:
                    now = losses[-1]
                    break
            else:
                for path, layer in self.layers.items():
                    _put(layer, before[path])
        return Trajectory(start=start, losses=tuple(losses), seconds=time.perf_counter() - begin)

    def held_out(self) -> float:
        """Mean loss of the held-out pieces."""
        with torch.no_grad():
            return sum(self.loss(number).item() for number in self.held) / len(self.held)

    def measure(self) -> dict[str, Curvature]:
        """Of each layer: mean x x^T and g g^T over tokens, mean gradient of the loss over pieces.

        Raises:
            ValueError: one is not finite; the layer is named.
        """
        known = {path: _empty(layer) for path, layer in self.layers.items()}
        with _listening(self.student, self.block, self.layers, known):
            for number in self.learned:
                self.loss(number).backward()
        for path, one in known.items():
            one.H /= max(1, one.tokens)
            one.Hz /= max(1, one.tokens)
            one.G /= len(self.learned)
            if not all(torch.isfinite(part).all() for part in (one.H, one.Hz, one.G)):
                raise ValueError(
                    f"{path}: a gradient is not finite. Run the model in float32, or leave the "
                    "refinement out with refine=none."
                )
        return known


@contextmanager
def _listening(
    student: Student, block: str, layers: Mapping[str, nn.Module], known: Mapping[str, Curvature]
) -> Iterator[None]:
    """Inputs of these layers, and gradients by their outputs, are added up in every backward.

    Nothing else asks for gradients, so that the backward ends at this block.
    """
    inside = {id(parameter) for parameter in student.adapter(block).values()}
    with ExitStack() as cleanup:
        for parameter in student.module.parameters():
            if parameter.requires_grad and id(parameter) not in inside:
                cleanup.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        for path, layer in layers.items():
            cleanup.callback(layer.register_forward_hook(_listener(known[path])).remove)
        try:
            yield
        finally:
            for parameter in student.adapter(block).values():
                parameter.grad = None


def _listener(one: Curvature) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
    def listen(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        x, y = args[0].detach(), first(output)
        if y.requires_grad:
            y.register_hook(lambda g: one.add(x.flatten(0, -2), g.flatten(0, -2)))

    return listen


def _empty(layer: nn.Module) -> Curvature:
    A, B, _ = _parts(layer)
    n, m = A.shape[1], B.shape[0]
    new = partial(torch.zeros, device=A.device)
    return Curvature(H=new(n, n), Hz=new(m, m), G=new(m, n))


def _factors(layer: nn.Module) -> LowRank:
    """s B and A of a layer, copies."""
    A, B, scaling = _parts(layer)
    return LowRank((scaling * B.detach())[None].float(), A.detach()[None].float().clone())


def _put(layer: nn.Module, factors: LowRank) -> None:
    """Store factors whose product is s B A."""
    A, B, scaling = _parts(layer)
    with torch.no_grad():
        A.copy_(factors.A[0] / scaling**0.5)
        B.copy_(factors.B[0] / scaling**0.5)


def _parts(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (rank, in), B (out, rank) and s of PEFT's layer."""
    return (
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
    )
