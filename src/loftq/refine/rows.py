"""A refinement as a row of stages; each stage descends one loss over the adapters of its scope.

Q stays as it is stored: only A and B move. With F a layer, a block or the whole model, x its input
in the original model and x_hat its input behind everything that was refined before it,

    layer, block    || F(x_hat; Q + s B A) - F(x; W) ||^2              (ApiQ, arXiv:2402.05147)
    model           hidden * || h_hat - h ||^2 / || h ||^2  +  kl * KL(p || p_hat)
                    +  language * cross-entropy                        (RILQ, arXiv:2412.01129)
    natural         the model's loss by natural-gradient steps, block after block   (natural.py)

h is the last hidden state, p the original model's distribution of the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from loftq.refine.losses import hidden_error, squared_error

STEP_PASSES = 0.75
"""Forwards over 128 windows that a step of a block takes: 16 with a backward, 16 held out."""
SCOPES = ("layer", "block", "model", "natural")
ERRORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "squared": squared_error,
    "per-token": hidden_error,
}
"""How an output is compared with the original one: (y_hat, y, mask) -> scalar."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One descent: what moves, towards what, how far."""

    scope: str
    """layer: each linear by itself; block: all of a block together; model: everything; natural:
    everything, by steps of one block at a time."""
    epochs: float
    """Passes over the training windows, of each layer, of each block, or of the model; natural:
    steps of each block."""
    rate: float
    """Largest learning rate (Adam); it falls to zero along a cosine. natural: the trust, the
    largest step relative to the correction."""
    batch: int
    """Windows in a step."""
    error: str = "per-token"
    """How outputs are compared (ERRORS); layer and block, and hidden."""
    hidden: float = 0.0
    """Weight of the error of the last hidden state; model only. A model without a language head
    has this term alone, whatever its weight."""
    kl: float = 0.0
    """Weight of the divergence from the original model's next-token distribution; model only."""
    language: float = 0.0
    """Weight of the cross-entropy with the text itself; model only."""

    def __post_init__(self) -> None:
        assert self.scope in SCOPES, self.scope
        assert self.error in ERRORS, self.error
        weighted = self.hidden + self.kl + self.language > 0
        whole = self.scope in ("model", "natural")
        assert weighted == whole, "the model's loss, and only it, is weighted"

    def passes(self, blocks: int) -> float:
        """Forwards over the text that it takes, a backward counted as two; about."""
        if self.scope != "natural":
            return 3 * self.epochs + 4
        return 1 + blocks * self.epochs * STEP_PASSES


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Stages, one after the other."""

    name: str
    summary: str
    """One line for help."""
    stages: tuple[Stage, ...]

    def with_epochs(self, epochs: float | None) -> Refinement:
        """A copy whose stages take `epochs` each; None leaves them as they are."""
        if epochs is None:
            return self
        return replace(self, stages=tuple(replace(stage, epochs=epochs) for stage in self.stages))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


_LAYER = Stage(scope="layer", epochs=10, rate=5e-4, batch=4, error="squared")
_BLOCK = Stage(scope="block", epochs=10, rate=5e-4, batch=4, error="squared")
_MODEL = Stage(scope="model", epochs=8, rate=2e-4, batch=8, hidden=0.5, language=0.5)
_NATURAL = Stage(scope="natural", epochs=1, rate=0.3, batch=4, language=1.0)
_DISTILL = Stage(scope="model", epochs=6, rate=5e-4, batch=8, kl=1.0)

_ROWS = (
    Refinement(name="none", summary="Leave the start as it is.", stages=()),
    Refinement(
        name="layer", summary="Each layer's output on what it will read (ApiQ-lw).",
        stages=(_LAYER,),
    ),
    Refinement(
        name="block", summary="Each block's output on what it will read (ApiQ-bw).",
        stages=(_BLOCK,),
    ),
    Refinement(
        name="hidden-language", summary="The last hidden state and the text itself (RILQ).",
        stages=(_MODEL,),
    ),
    Refinement(
        name="distill", summary="The original model's next-token distribution.",
        stages=(_DISTILL,),
    ),
    Refinement(
        name="natural",
        summary="A natural-gradient step of each block on the text (Align-then-Correct).",
        stages=(_NATURAL,),
    ),
    Refinement(
        name="block-distill", summary="Block by block, then the next-token distribution.",
        stages=(replace(_BLOCK, epochs=4), _DISTILL),
    ),
)  # fmt: skip
REFINEMENTS: dict[str, Refinement] = {row.name: row for row in _ROWS}


def find_refinement(name: str) -> Refinement:
    """The refinement of that name.

    Raises:
        ValueError: unknown.
    """
    if name not in REFINEMENTS:
        raise ValueError(f"refine={name!r} does not exist; choose one of {', '.join(REFINEMENTS)}.")
    return REFINEMENTS[name]
