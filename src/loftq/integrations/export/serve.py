"""How an export is served: the exact command for each engine, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any

from loftq.checkpoint.export import NAMES, Layout, cannot_read
from loftq.integrations.engines import too_old
from loftq.integrations.export.job import ADAPTER, Job
from loftq.integrations.peft import scaling_of
from loftq.pipeline.serving import LORA_RANKS, max_lora_rank

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


@dataclass(frozen=True, kw_only=True)
class Serve:
    """One way to serve an export."""

    engine: str
    command: str
    """For a shell, or Python where the engine is a library."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def vllm(job: Job, *, base: str, adapter: str, rank: int, flags: str = "") -> Iterator[Serve]:
    """`vllm serve` with the adapter beside the base; nothing where vLLM cannot do that."""
    if job.source.architecture.endswith("ForCausalLM") and not adapter_limits(job, rank):
        words = ["vllm serve", quoted(base), *flags.split(), "--enable-lora"]
        words.append(f"--lora-modules {_name(job)}={quoted(adapter)}")
        words.append(max_lora_rank(rank))
        yield Serve(engine="vllm", command=" ".join(words))


def adapter_limits(job: Job, rank: int) -> list[str]:
    """What keeps vLLM from serving the adapter beside its base."""
    lora, problems = job.source.adapter, []
    if not max_lora_rank(rank):
        problems.append(f"vLLM takes adapters up to rank {LORA_RANKS[-1]}, this one has {rank}")
    if lora.whole or lora.config.get("modules_to_save"):
        problems.append("vLLM refuses adapters that hold whole layers (modules_to_save)")
    if lora.config.get("use_dora"):
        problems.append("vLLM refuses DoRA")
    if not all(isclose(scaling_of(lora.config, module), lora.scaling) for module in lora.pairs):
        problems.append("vLLM scales all layers alike, and some have an alpha of their own")
    if any(_is_end(module) for module in lora.pairs):
        problems.append("vLLM refuses adapters on embeddings and heads in recent releases")
    return problems


def transformers(
    job: Job, *, base: str, adapter: str | None, dtype: str = "", unpack: bool = False
) -> Serve:
    """Python: the base through its Auto class, the adapter through PEFT.

    Args:
        job: what is exported.
        base: folder or name of the base.
        adapter: folder of the adapter, or None for a merged model.
        dtype: to load in; "" = config.json's.
        unpack: one forward pass, in which compressed-tensors makes the dense weights that PEFT asks
            for. (Its `dequantize=True` at load does so too, for models of one width alone.)
    """
    ending = job.source.architecture
    auto = next((c for end, c in AUTO_CLASSES.items() if ending.endswith(end)), "AutoModel")
    words = repr(base) + (f", dtype={dtype!r}" if dtype else "")
    lines = [f"from transformers import {auto}"]
    if adapter is not None:
        lines.append("from peft import PeftModel")
    lines.append(f"model = {auto}.from_pretrained({words})")
    if unpack:
        lines.append("model(**model.dummy_inputs)")
    if adapter is not None:
        lines.append(f"model = PeftModel.from_pretrained(model, {adapter!r})")
    return Serve(engine="transformers", command="; ".join(lines))


def packed_commands(
    job: Job, layout: Layout, *, dtype: str = "", unpack: bool = False
) -> tuple[Serve, ...]:
    """Each engine that reads the layout, for a model folder with its adapter inside."""
    base, adapter = str(job.output), str(job.output / ADAPTER)
    flags = f"--dtype {dtype}" if dtype else ""
    rank = job.source.adapter.highest_rank
    places = (
        *vllm(job, base=base, adapter=adapter, rank=rank, flags=flags),
        transformers(job, base=base, adapter=adapter, dtype=dtype, unpack=unpack),
    )
    refused = unreadable(job, layout)
    return tuple(place for place in places if place.engine not in refused)


def packed_limits(job: Job, layout: Layout) -> list[str]:
    """What holds of every packed export: whose the adapter is, and which engine cannot read it."""
    rank = job.source.adapter.highest_rank
    return [
        f"the adapter (rank {rank}) belongs to this base alone: on another it is noise",
        *(f"not for {NAMES[k]}: {why}" for k, why in unreadable(job, layout).items()),
        *(adapter_limits(job, rank) if "vllm" in layout.readers else ()),
        *too_old(layout.name),
    ]


def unreadable(job: Job, layout: Layout) -> dict[str, str]:
    """Engines that read the layout, but not this model in it -> why."""
    source = job.source
    reasons = {k: cannot_read(k, layout, source.weights, source.kept) for k in layout.readers}
    return {engine: why for engine, why in reasons.items() if why}


def _is_end(module: str) -> bool:
    return module.rpartition(".")[2] in ("lm_head", "embed_tokens", "embed_out", "wte")


def _name(job: Job) -> str:
    stem = job.source.path.name or Path(job.output).name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in stem) or "adapter"


def quoted(path: str) -> str:
    """A path as a word of the shell."""
    import shlex

    return shlex.quote(path)
