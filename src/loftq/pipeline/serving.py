"""Where a packed backbone can be served without rounding it again, told from its formats alone.

Everything packed here runs in transformers with PEFT after `import loftq`. Another engine can hold
a layer exactly when its own layout has the same levels, groups and scale coding: then the codes are
only laid out anew. This is a property of the format, known before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from loftq.formats import FormatSpec
from loftq.pipeline.layout import LayerInfo
from loftq.pipeline.plan import Plan

BNB_BLOCKS = (64, 128, 256)
INTEGER_GROUPS = (0, 32, 64, 128)
"""Groups that GPTQ and compressed-tensors kernels know; 0 is one scale per row."""
WORD = 32  # GPTQ's codes and zeros are stored as int32


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
    layers = [(layer.info, layer.spec) for layer in plan.layers]
    rank = plan.config.rank
    own = Serving(
        engine="transformers + PEFT", exact=True, note="any format, with `import loftq` first"
    )
    return (
        own,
        _fits("bitsandbytes NF4", layers, _bitsandbytes, "stock transformers, vLLM", uniform=True),
        _fits("GPTQ", layers, _gptq, f"vLLM (--max-lora-rank {_vllm_rank(rank)}), transformers"),
        _fits(
            "compressed-tensors", layers, _compressed, f"vLLM (--max-lora-rank {_vllm_rank(rank)})"
        ),
        _fits("GGUF Q4_0 / IQ4_NL", layers, _gguf, "llama.cpp and what is built on it"),
    )


def _fits(
    engine: str,
    layers: Sequence[tuple[LayerInfo, FormatSpec]],
    obstacle: Callable[[LayerInfo, FormatSpec], str],
    readers: str,
    *,
    uniform: bool = False,
) -> Serving:
    for info, spec in layers:
        found = "an embedding" if info.kind == "embedding" else obstacle(info, spec)
        if found:
            return Serving(engine=engine, exact=False, note=f"{info.module} ({spec}): {found}")
    formats = sorted({str(spec) for _, spec in layers})
    if uniform and len(formats) > 1:
        note = f"one format for the whole model, found {', '.join(formats)}"
        return Serving(engine=engine, exact=False, note=note)
    return Serving(engine=engine, exact=True, note=f"same codes and scales; read by {readers}")


def _bitsandbytes(info: LayerInfo, spec: FormatSpec) -> str:
    if (spec.grid, spec.bits) != ("nf", 4):
        return "its only 4-bit NormalFloat is nf4"
    if spec.scale_coding not in ("dq", "f32"):
        return "scales must be -dq or -f32"
    if spec.group_size not in BNB_BLOCKS:
        return f"groups must be {', '.join(map(str, BNB_BLOCKS))}"
    return _whole_groups(info, spec) or _plain_linear(info)


def _gptq(info: LayerInfo, spec: FormatSpec) -> str:
    whole_words = not any(size % WORD for size in info.shape)
    return _compressed(info, spec) or ("" if whole_words else f"sizes must be multiples of {WORD}")


def _compressed(info: LayerInfo, spec: FormatSpec) -> str:
    return _integer(spec) or _whole_groups(info, spec) or _plain_linear(info)


def _integer(spec: FormatSpec) -> str:
    if spec.grid != "sint" or spec.scale_coding != "f16":
        return "needs symmetric integers with float16 scales, such as sint4-g64-f16"
    if spec.group_size not in INTEGER_GROUPS:
        return "groups must be 32, 64, 128 or channel"
    return ""


def _gguf(info: LayerInfo, spec: FormatSpec) -> str:
    if str(spec) not in ("sint4-g32-f16", "iq4nl-g32-f16"):
        return "needs sint4-g32-f16 (Q4_0) or iq4nl-g32-f16 (IQ4_NL)"
    return _whole_groups(info, spec)


def _whole_groups(info: LayerInfo, spec: FormatSpec) -> str:
    columns = info.shape[1]
    if spec.group_size > 0 and columns % spec.group_size:
        return f"{columns} columns are not whole groups of {spec.group_size}"
    return ""


def _plain_linear(info: LayerInfo) -> str:
    return "a Conv1D, stored transposed" if info.kind == "conv1d" else ""


def _vllm_rank(rank: int) -> int:
    """The smallest rank limit that vLLM takes and that admits `rank`."""
    known = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    return next((limit for limit in known if limit >= rank), known[-1])
