"""`--to gguf`: model.gguf and adapter.gguf for llama.cpp, written tensor by tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.checkpoint import Checkpoint
from loftq.checkpoint.durable import check_space, explained
from loftq.checkpoint.export import GGUF_TYPES, Gguf, Packed
from loftq.integrations.export.gguf_names import GgufNames, gguf_module
from loftq.integrations.export.gguf_vocab import write_vocab
from loftq.integrations.export.job import Job
from loftq.integrations.export.model import side_files
from loftq.integrations.export.source import ExportError, ExportSource

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
DENSE = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
"""dtype in a safetensors file -> GGML type of a matrix; vectors are always F32."""
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Make = Callable[[], Tensor]


class Planned:
    """The tensors of a GGUF file in order: what the header says of each, and how to make it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, tuple[int, ...], int, Make]] = []

    def add(self, name: str, kind: str, shape: tuple[int, ...], make: Make) -> None:
        """One tensor: `make` gives its bytes (rows, bytes) uint8; `shape` counts those bytes."""
        size = 1
        for length in shape:
            size *= length
        self.rows.append((name, kind, shape, size, make))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(row[3] for row in self.rows)


def write_gguf(job: Job) -> int:
    """Write both files and compare them with the source through gguf's own reader.

    Returns:
        Number of tensors compared.

    Raises:
        ExportError: an architecture, setting or tokenizer that we cannot translate.
    """
    names = GgufNames(job.source.architecture, job.source.config)
    job.source.adapter.plain()
    model, adapter = _model_tensors(job, names), _adapter_tensors(job, names)
    total, done = 2 * (len(model.rows) + len(adapter.rows)), 0

    def step() -> None:
        nonlocal done
        done += 1
        job.step(done, total)

    with explained(job.folder, model.nbytes + adapter.nbytes):
        check_space(job.folder, model.nbytes + adapter.nbytes)
        _write(job.folder / MODEL, names, lambda w: _describe(w, job, names), model, step)
        _write(job.folder / ADAPTER, names, lambda w: _describe_adapter(w, job), adapter, step)
        for name, content in side_files(job, adapter=False).items():
            (job.folder / name).write_bytes(content)
    _check(job.folder / MODEL, model, step)
    _check(job.folder / ADAPTER, adapter, step)
    _check_values(job, names)
    return total // 2


def _model_tensors(job: Job, names: GgufNames) -> Planned:
    source, layout, planned = job.source, Gguf(), Planned()
    by_stem = {weight.stem: weight for weight in source.weights}
    copied = set(source.copied)
    for name, entry in source.backbone.tensors.items():
        stem = name.rpartition(".")[0]
        if name in copied:
            target = names.tensor(name)
            if target is None:
                continue
            kind = DENSE.get(entry.dtype) if len(entry.shape) > 1 else "F32"
            if kind is None:
                raise ExportError(
                    f"{name}: dtype {entry.dtype}, expected a float of 16 or 32 bits."
                )
            width = entry.shape[-1] * (4 if kind == "F32" else 2)
            order = names.order(name, entry.shape[0])
            make = partial(_dense, source.backbone, name, kind, order)
            planned.add(target, kind, (*entry.shape[:-1], width), make)
        elif stem in by_stem:
            weight = by_stem.pop(stem)
            (spec,) = layout.tensors(weight)
            target, order = names.tensor(spec.name), names.order(spec.name, weight.shape[0])
            assert target is not None, spec.name
            make = partial(_blocks, source, weight, order)
            planned.add(target, GGUF_TYPES[str(weight.spec)], spec.shape, make)
    for name, tensor in names.extra_tensors().items():
        planned.add(name, "F32", (4 * tensor.numel(),), partial(tensor.view, torch.uint8))
    return planned


def _dense(source: Checkpoint, name: str, kind: str = "F32", order: Tensor | None = None) -> Tensor:
    """A tensor of the source in a GGUF float type, its rows in GGUF's order, as bytes."""
    values = source.read(name).to(TORCH_TYPES[kind])
    values = values if order is None else values[order]
    return values.contiguous().view(torch.uint8)


def _blocks(source: ExportSource, weight: Packed, order: Tensor | None) -> Tensor:
    (packed,) = Gguf().pack(weight, source.read(weight)).values()
    return packed if order is None else packed[order]


def _adapter_tensors(job: Job, names: GgufNames) -> Planned:
    """A and B of each layer, float32; the rows of B follow those of the weight."""
    lora, planned = job.source.adapter, Planned()
    if lora.whole:
        raise ExportError(
            f"{lora.folder}: holds {next(iter(lora.whole))}, a whole tensor beside the LoRA "
            "factors, which llama.cpp's adapters have no place for. Train without modules_to_save."
        )
    for module, pair in lora.pairs.items():
        weight = f"{module}.weight"
        target = names.tensor(weight)
        if target is None:
            raise ExportError(f"{module}: llama.cpp has no such layer to adapt (a tied head?).")
        shape_a, shape_b = (lora.tensors.tensors[pair[part]].shape for part in ("A", "B"))
        order = names.order(weight, shape_b[0])

        A, B = partial(_dense, lora.tensors, pair["A"]), partial(_dense, lora.tensors, pair["B"])
        planned.add(f"{target}.lora_a", "F32", (shape_a[0], 4 * shape_a[1]), A)
        planned.add(
            f"{target}.lora_b", "F32", (shape_b[0], 4 * shape_b[1]), partial(B, order=order)
        )
    return planned


def _describe(writer: GGUFWriter, job: Job, names: GgufNames) -> None:
    gguf, source = gguf_module(), job.source
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(job.output.name)
    kinds = [GGUF_TYPES[str(weight.spec)] for weight in source.weights]
    most = max(sorted(set(kinds)), key=kinds.count)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names.write_settings(writer)
    vocab = job.options.get("vocab")
    write_vocab(
        writer, source.tokenizer, source.config["vocab_size"], vocab=Path(vocab) if vocab else None
    )


def _describe_adapter(writer: GGUFWriter, job: Job) -> None:
    gguf, lora = gguf_module(), job.source.adapter
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_name(f"{job.output.name}-adapter")
    # llama.cpp scales by alpha / rank, whatever the training did.
    writer.add_float32("adapter.lora.alpha", lora.scaling * lora.rank)


def _write(
    path: Path,
    names: GgufNames,
    describe: Callable[[GGUFWriter], None],
    planned: Planned,
    step: Callable[[], None],
) -> None:
    gguf = gguf_module()
    writer = gguf.GGUFWriter(None, names.arch)
    describe(writer)
    for name, kind, shape, size, _ in planned.rows:
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, _uint8(), size, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, make in planned.rows:
        writer.write_tensor_data(make().numpy())
        step()
    for file in writer.fout:
        file.flush()
        os.fsync(file.fileno())
    writer.close()


def _uint8() -> Any:
    import numpy

    return numpy.dtype("uint8")


def _check(path: Path, planned: Planned, step: Callable[[], None]) -> None:
    """Every tensor's name, type and bytes, as gguf's reader finds them."""
    found = {tensor.name: tensor for tensor in gguf_module().GGUFReader(path).tensors}
    for name, kind, _, size, make in planned.rows:
        tensor = found.get(name)
        same = tensor is not None and tensor.tensor_type.name == kind and tensor.n_bytes == size
        if not same or not torch.equal(_bytes(tensor), make().flatten()):
            raise ExportError(
                f"{path}: {name} reads back differently from what was written. The disk or the "
                "memory is at fault: export again."
            )
        step()


def _bytes(tensor: Any) -> Tensor:
    """A tensor of a reader as flat bytes, mapped from the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(tensor.data.view("uint8").reshape(-1))


def _check_values(job: Job, names: GgufNames) -> None:
    """Every packed weight as the gguf package dequantizes it, against ours."""
    gguf = gguf_module()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(job.folder / MODEL).tensors}
    for weight in job.source.weights:
        name = f"{weight.stem}.weight"
        tensor = found[str(names.tensor(name))]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        wanted = job.source.read(weight).dequantize()
        order = names.order(name, weight.shape[0])
        if not torch.equal(values, wanted if order is None else wanted[order]):
            raise ExportError(
                f"{weight.module}: gguf reads other weights than were packed. This is an error of "
                "ours: report it with the format of the layer."
            )
