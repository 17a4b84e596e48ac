"""Where a packed backbone can be served without rounding it again, told from its formats alone.

Everything packed here runs in transformers with PEFT after `import loftq`. Another engine can hold
a layer exactly when its own layout has the same levels, groups and scale coding: then the codes are
only laid out anew. The rules are those that `loftq export` refuses by (`checkpoint/export`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from loftq.checkpoint.export import (
    ARCHITECTURES,
    LAYOUTS,
    NAMES,
    Layout,
    Packed,
    cannot_read,
    first_obstacle,
)
from loftq.pipeline.plan import Plan

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Whether one engine can hold every packed layer exactly."""

    engine: str
    """Engine, with the layout it would read."""
    exact: bool
    """Whether all layers fit without loss."""
    note: str
    """What to know when they do; the first layer that does not fit, and why, when they do not."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def where_served(plan: Plan) -> tuple[Serving, ...]:
    """The engines, and whether the planned backbone fits each without loss."""
    weights = [
        Packed(
            module=layer.info.module,
            stem=layer.stem,
            spec=layer.rival or layer.spec,
            shape=layer.info.shape,
            kind=layer.info.kind,
        )
        for layer in plan.layers
    ]
    own = Serving(
        engine="transformers + PEFT", exact=True, note="any format, with `import loftq` first"
    )
    others = (_place(layout, weights, plan) for layout in LAYOUTS)
    return (own, *others)


def _place(layout: Layout, weights: list[Packed], plan: Plan) -> Serving:
    problem = architecture_obstacle(layout, plan.layout.architecture)
    problem = problem or first_obstacle(layout, weights)
    if problem:
        return Serving(engine=layout.engine, exact=False, note=problem)
    kept = [module.module for module in plan.layout.kept]
    reasons = {engine: cannot_read(engine, layout, weights, kept) for engine in layout.readers}
    if all(reasons.values()):
        found = "; ".join(f"not read by {NAMES[k]}: {reason}" for k, reason in reasons.items())
        return Serving(engine=layout.engine, exact=False, note=found)
    flag = max_lora_rank(plan.largest_rank) or "no adapter of this rank"
    shown = {**NAMES, "vllm": f"{NAMES['vllm']} ({flag})"}
    words = [f"read by {', '.join(shown[k] for k, reason in reasons.items() if not reason)}"]
    words += [f"not by {NAMES[k]}: {reason}" for k, reason in reasons.items() if reason]
    note = f"loftq export --to {layout.name}; {'; '.join(words)}"
    return Serving(engine=layout.engine, exact=True, note=note)


def architecture_obstacle(layout: Layout, architecture: str) -> str:
    """Why a layout cannot hold models of this class at all; "" if it can.

    GGUF files name tensors and settings in their own way, so each architecture is a translation.
    """
    if layout.name != "gguf" or architecture in ARCHITECTURES:
        return ""
    return f"{architecture}: GGUF files are written for {', '.join(ARCHITECTURES)}"


def max_lora_rank(rank: int) -> str:
    """vLLM's flag with the smallest limit that it takes and that admits `rank`.

    Empty for ranks that no limit admits: vLLM cannot serve such an adapter beside its base.
    """
    limit = next((known for known in LORA_RANKS if known >= rank), None)
    return "" if limit is None else f"--max-lora-rank {limit}"
