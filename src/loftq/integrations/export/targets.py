"""The table of exports: what each target is called, how it is written, and how it is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loftq.checkpoint.export import BitsAndBytes, CompressedTensors, Gguf, Gptq, Layout
from loftq.integrations.export import serve
from loftq.integrations.export.dense import dense_dtype, write_dense
from loftq.integrations.export.gguf_file import ADAPTER, MODEL, write_gguf
from loftq.integrations.export.job import Job
from loftq.integrations.export.lora import original_model, write_lora
from loftq.integrations.export.model import write_model
from loftq.integrations.export.serve import Serve

SCALE_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """One row: a target of `loftq export --to`."""

    name: str
    summary: str
    """What it is, for people."""
    layout: Layout | None
    """Which packed weights it can hold; None = any, for it holds none."""
    write: Callable[[Job], int]
    """Writes the folder and compares it with the source; the number of tensors compared."""
    commands: Callable[[Job], tuple[Serve, ...]]
    """How to serve it, the first engine first."""
    limits: Callable[[Job], list[str]]
    """What to know and what cannot be done with it."""
    options: tuple[str, ...] = ()
    """Options that it takes, besides those of all."""


def _bnb_layout(job: Job) -> BitsAndBytes:
    return BitsAndBytes(dtype=job.source.dtype)


def _write_bnb(job: Job) -> int:
    return write_model(job, _bnb_layout(job), {})


def _bnb_commands(job: Job) -> tuple[Serve, ...]:
    return serve.packed_commands(job, BitsAndBytes())


def _bnb_limits(job: Job) -> list[str]:
    return [
        *serve.packed_limits(job, BitsAndBytes()),
        "vLLM serves it on one GPU: pre-quantized bitsandbytes weights are not split (tensor "
        "parallelism is refused)",
        "on CPUs with AVX512-BF16 bitsandbytes multiplies in bfloat16, whatever the model's dtype",
    ]


def _scale_dtype(job: Job) -> str:
    return SCALE_DTYPES[job.source.weights[0].spec.scale_coding]


def _write_integers(layout: Layout) -> Callable[[Job], int]:
    # Engines cast scales to the dtype of the model: in that of the scales nothing is rounded.
    def write(job: Job) -> int:
        return write_model(job, layout, {"dtype": _scale_dtype(job)})

    return write


def _integer_commands(layout: Layout, *, unpack: bool) -> Callable[[Job], tuple[Serve, ...]]:
    def commands(job: Job) -> tuple[Serve, ...]:
        return serve.packed_commands(job, layout, dtype=_scale_dtype(job), unpack=unpack)

    return commands


def _integer_limits(layout: Layout, in_transformers: str) -> Callable[[Job], list[str]]:
    def limits(job: Job) -> list[str]:
        dtype = _scale_dtype(job)
        found = [
            *serve.packed_limits(job, layout),
            f"run it in {dtype}: engines cast the scales to the model's dtype, and another 16-bit "
            f"dtype rounds them (they also round each unpacked weight to {dtype})",
        ]
        if job.source.dtype not in (dtype, "float32"):
            found.append(f"the original ran in {job.source.dtype}: activations are in {dtype} now")
        widths = {weight.spec.bits for weight in job.source.weights}
        if widths & {2, 3}:
            found.append("2 and 3 bits run in vLLM's general kernels, slower than 4 and 8")
        if "transformers" not in serve.unreadable(job, layout):
            found.append(in_transformers)
        return found

    return limits


def _gguf_commands(job: Job) -> tuple[Serve, ...]:
    words = f"-m {serve.quoted(str(job.output / MODEL))}"
    words += f" --lora {serve.quoted(str(job.output / ADAPTER))}"
    return (Serve(engine="llama.cpp", command=f"llama-server {words}"),)


def _gguf_limits(job: Job) -> list[str]:
    return [
        *serve.packed_limits(job, Gguf()),
        "llama.cpp rounds activations to 8 bits before it multiplies, so logits differ from "
        "transformers' in the third digit although the weights are the same",
        "do not run it through llama-quantize, and do not merge the adapter there "
        "(llama-export-lora): both round again",
    ]


def _lora_commands(job: Job) -> tuple[Serve, ...]:
    base, folder = original_model(job), str(job.output)
    rank = job.source.adapter.rank + job.source.start.rank
    served = serve.vllm(job, base=base, adapter=folder, rank=rank)
    return (*served, serve.transformers(job, base=base, adapter=folder))


def _lora_limits(job: Job) -> list[str]:
    rank = job.source.adapter.rank + job.source.start.rank
    return [
        f"for {original_model(job)}, not for the packed model; rank {rank} (twice the training's)",
        "what training changed is carried exactly; what the packed model had lost by rounding is "
        "not there any more, so the two models differ by that. Measure it: loftq eval gap "
        f"{serve.quoted(str(job.source.path))} {serve.quoted(str(job.output))} --data FILE",
        *serve.adapter_limits(job, rank),
    ]


def _dense_commands(job: Job) -> tuple[Serve, ...]:
    base = str(job.output)
    served: tuple[Serve, ...] = ()
    if job.source.architecture.endswith("ForCausalLM"):
        served = (Serve(engine="vllm", command=f"vllm serve {serve.quoted(base)}"),)
    return (*served, serve.transformers(job, base=base, adapter=None))


def _dense_limits(job: Job) -> list[str]:
    dtype = str(dense_dtype(job)).removeprefix("torch.")
    return [
        f"as large as the original in {dtype}: it is for engines that hold none of our formats",
        "merged from the packed weights and the adapter, in float32 and rounded once; do not "
        "quantize it again, that rounding would be a new one",
    ]


EXPORTS: dict[str, Export] = {
    export.name: export
    for export in (
        Export(
            name="bnb",
            summary="bitsandbytes NF4 with the adapter: transformers, vLLM",
            layout=BitsAndBytes(),
            write=_write_bnb,
            commands=_bnb_commands,
            limits=_bnb_limits,
            options=("max_shard_bytes",),
        ),
        Export(
            name="gptq",
            summary="GPTQ with the adapter: vLLM, transformers with gptqmodel",
            layout=Gptq(),
            write=_write_integers(Gptq()),
            commands=_integer_commands(Gptq(), unpack=False),
            limits=_integer_limits(
                Gptq(), "transformers reads it with the packages gptqmodel and optimum"
            ),
            options=("max_shard_bytes",),
        ),
        Export(
            name="compressed-tensors",
            summary="compressed-tensors with the adapter: vLLM, transformers",
            layout=CompressedTensors(),
            write=_write_integers(CompressedTensors()),
            commands=_integer_commands(CompressedTensors(), unpack=True),
            limits=_integer_limits(
                CompressedTensors(),
                "transformers unpacks the layers in the first forward pass, as the adapter needs: "
                "no memory is saved there",
            ),
            options=("max_shard_bytes",),
        ),
        Export(
            name="gguf",
            summary="GGUF base and GGUF adapter: llama.cpp",
            layout=Gguf(),
            write=write_gguf,
            commands=_gguf_commands,
            limits=_gguf_limits,
            options=("vocab",),
        ),
        Export(
            name="lora",
            summary="what training changed, as an adapter for the original model",
            layout=None,
            write=write_lora,
            commands=_lora_commands,
            limits=_lora_limits,
            options=("base",),
        ),
        Export(
            name="dense",
            summary="an ordinary model, merged from the packed weights and the adapter",
            layout=None,
            write=write_dense,
            commands=_dense_commands,
            limits=_dense_limits,
            options=("dtype", "max_shard_bytes"),
        ),
    )
}
"""Every target; a new one is a row here and a file for its layout."""

ENGINES: dict[str, tuple[str, ...]] = {
    "transformers": ("bnb", "compressed-tensors", "gptq"),
    "vllm": ("compressed-tensors", "gptq", "bnb"),
    "llama.cpp": ("gguf",),
}
"""Engine of --for -> targets that it reads, the best first."""
