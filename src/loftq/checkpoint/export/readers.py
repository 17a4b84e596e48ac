"""What an engine cannot read of a layout that could hold the weights: limits of its loader.

transformers builds GPTQ layers through optimum, with the same bits and groups for all of them. vLLM
joins the projections that read the same input into one matrix, which takes one format.
"""

from __future__ import annotations

from collections.abc import Sequence

from loftq.checkpoint.export.layout import Layout, Packed

NAMES = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}
"""Engine, as --for takes it -> its name for people."""
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one module that vLLM joins."""
DENSE = "16 bits"


def cannot_read(engine: str, layout: Layout, weights: Sequence[Packed], kept: Sequence[str]) -> str:
    """Why `engine` cannot read these weights in `layout`; "" if it can.

    Args:
        engine: as --for takes it.
        layout: one that holds every weight.
        weights: all packed weights.
        kept: paths of the linear-like modules left dense.
    """
    if engine not in layout.readers:
        return f"{NAMES[engine]} does not read {layout.engine}"
    if engine == "vllm":
        return _unlike_joined(weights, kept)
    if engine == "transformers" and layout.name == "gptq":
        formats = sorted({str(weight.spec) for weight in weights})
        if len(formats) > 1:
            return f"transformers builds all its layers alike, found {' and '.join(formats)}"
    return ""


def _unlike_joined(weights: Sequence[Packed], kept: Sequence[str]) -> str:
    formats = dict.fromkeys(kept, DENSE) | {w.module: str(w.spec) for w in weights}
    for module in formats:
        parent, _, name = module.rpartition(".")
        for names in JOINED:
            found = {n: formats[f"{parent}.{n}"] for n in names if f"{parent}.{n}" in formats}
            if name == names[0] and len(set(found.values())) > 1:
                listed = ", ".join(f"{n} {format_}" for n, format_ in found.items())
                return f"vLLM joins {' and '.join(names)}, and {parent} has {listed}"
    return ""
