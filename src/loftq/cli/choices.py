"""Each choice of a quantization with its reason, for the first lines that a user reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import asdict, dataclass

from loftq.pipeline.plan import Plan

ASKED = "as asked"


@dataclass(frozen=True)
class Choice:
    """One thing that was decided."""

    name: str
    value: str
    reason: str
    """Why, or "as asked"."""

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return asdict(self)


def choices(plan: Plan, given: Set[str]) -> list[Choice]:
    """What was chosen for this plan, in the order in which it matters.

    Args:
        plan: the plan.
        given: options that the user set; all others are defaults.
    """
    return [_format(plan, given), *_rotation(plan), _method(plan, given), *_data(plan, given),
            *_refinement(plan, given), _rank(plan, given),
            _alpha(plan, given), _layers(plan, given), _fit(plan, given),
            _device(plan, given)]  # fmt: skip


def _format(plan: Plan, given: Set[str]) -> Choice:
    names = Counter(str(layer.spec) for layer in plan.layers)
    value = ", ".join(names) if len(names) < 4 else f"{len(names)} formats"
    value += f" ({plan.bits_per_weight:.2f} bits a weight with scales)"
    if plan.choice is not None:
        reason = f"least {plan.choice.allocation} cost within {plan.config.bits:g} bits a weight"
        return Choice("format", value, reason)
    if plan.config.engine is not None:
        return Choice("format", value, f"the one that {plan.config.engine} can hold without loss")
    if given & {"format", "formats", "bits"}:
        return Choice("format", value, ASKED)
    return Choice(
        "format",
        value,
        "4 bits: where QLoRA and LoftQ report the quality of 16-bit fine-tuning; --bits 3 or 2 "
        "for less",
    )


def _rotation(plan: Plan) -> list[Choice]:
    """Which layers have rotated inputs, or may get them; none where nothing rotates."""
    blocks = {layer.spec.rotation for layer in plan.layers if layer.spec.rotation}
    tried = [layer.rival for layer in plan.layers if layer.rival]
    if tried:
        sizes = ", ".join(str(size) for size in sorted({spec.rotation for spec in tried}))
        value = f"auto: {len(tried)} layers, in blocks of {sizes}"
        return [Choice("rotation", value, "solved twice, the smaller error stays")]
    if blocks:
        turned = sum(bool(layer.spec.rotation) for layer in plan.layers)
        value = f"{turned} layers, in blocks of {', '.join(map(str, sorted(blocks)))}"
        return [Choice("rotation", value, ASKED)]
    return []


def _method(plan: Plan, given: Set[str]) -> Choice:
    method = plan.config.resolved_method()
    value = f"{method.name}, T = {method.iterations}"
    if "method" in given:
        return Choice("method", value, f"{ASKED}: {method.summary}")
    reason = "needs no data; backbone and adapters are fitted together"
    if "iters" not in given:
        reason += ", and the best of 5 alternations is kept: more gain little"
    return Choice("method", value, reason)


def _data(plan: Plan, given: Set[str]) -> list[Choice]:
    """The calibration text, or that it is not looked at."""
    known = plan.calibration
    if known is not None:
        value = f"{known.source}: {known.tokens:,} tokens, {known.windows} windows"
        return [Choice("data", value, f"{known.kind} statistics of each layer, without padding")]
    if reader := plan.config.text_reader:  # the costs alone
        return [Choice("data", str(plan.config.data), f"costs of layers, by {reader}")]
    if "data" not in given:
        return []
    return [Choice("data", "not used", f"{plan.config.method} needs no text")]


def _refinement(plan: Plan, given: Set[str]) -> list[Choice]:
    """The stages that gradients work in; none where the adapters stay as they are solved."""
    refinement = plan.config.refinement()
    if not refinement.stages:
        return []
    value = ", ".join(f"{stage.scope} x {stage.epochs:g}" for stage in refinement.stages)
    reason = ASKED if "refine" in given else f"what {plan.config.method} does"
    return [Choice("refine", f"{refinement.name} ({value} passes)", reason)]


def _rank(plan: Plan, given: Set[str]) -> Choice:
    parameters = plan.adapter_parameters
    ranks = sorted({layer.rank for layer in plan.layers if layer.rank})
    value = f"{', '.join(map(str, ranks))} ({parameters:,} adapter weights)"
    share = f"{parameters / plan.weights:.1%} of the quantized weights"
    if plan.config.ranks and plan.choice is not None:
        reason = f"least {plan.choice.allocation} cost, layer by layer: {share}"
        return Choice("rank", value, reason)
    if "rank" in given:
        return Choice("rank", value, f"{ASKED}: {share}")
    return Choice("rank", value, f"{share}; a higher rank corrects more and costs more")


def _alpha(plan: Plan, given: Set[str]) -> Choice:
    config = plan.config
    alpha = config.rank if config.alpha is None else config.alpha
    if "alpha" in given or config.rslora:
        reason = (
            f"{ASKED}: the adapter enters with factor {config.scaling:.4g}, the start allows for it"
        )
        return Choice("alpha", f"{alpha:g}", reason)
    return Choice("alpha", f"{alpha:g}", "= rank, so that the adapter enters with factor 1")


def _layers(plan: Plan, given: Set[str]) -> Choice:
    layout = plan.layout
    kinds = Counter(layer.info.kind for layer in plan.layers)
    linears = sum(n for kind, n in kinds.items() if kind != "embedding")
    tables = [layer for layer in plan.layers if not layer.rank]
    linears -= sum(layer.info.kind != "embedding" for layer in tables)
    value = f"{linears} linear layers" + (f" in {layout.blocks} blocks" if layout.blocks else "")
    if tables:
        value += f", and {', '.join(x.info.module for x in tables)} in {tables[0].spec.bits} bits"
    elif kinds["embedding"]:
        value += f" and {kinds['embedding']} embeddings"
    if given & {"targets", "skip", "embeddings", "embedding", "head"}:
        return Choice("layers", value, ASKED)
    kept = ", ".join(dict.fromkeys(kept.reason for kept in layout.kept))
    reason = "all of them: QLoRA needs adapters on every one to match full fine-tuning"
    return Choice("layers", value, reason + (f"; left alone: {kept}" if kept else ""))


def _fit(plan: Plan, given: Set[str]) -> Choice:
    fits = sorted({layer.scale_fit for layer in plan.layers})
    if "scale_fit" in given:
        reason = ASKED
    elif plan.config.resolved_method().scale_fit is not None:
        reason = f"what {plan.config.method} prescribes"
    else:
        reason = "the format's own default"
    return Choice("scale fit", ", ".join(fits), reason)


def _device(plan: Plan, given: Set[str]) -> Choice:
    if "device" in given:
        return Choice("device", plan.device, ASKED)
    found = "no GPU that torch can use" if plan.device == "cpu" else "a GPU is here"
    return Choice("device", plan.device, found)
