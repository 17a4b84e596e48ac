"""The header of a safetensors file: checked in full before a byte of data is trusted.

A file is 8 bytes of header length (little endian), a JSON object naming each tensor's dtype, shape
and place, then the data. We accept what the format allows and nothing else: the tensors tile the
data section exactly, without overlap, gap or tail, so a flipped or missing byte cannot go unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_HEADER_BYTES = 100_000_000  # the bound of the format's reference reader
MAX_DIMENSIONS = 64

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in _TORCH_NAMES.items()
    if hasattr(torch, attribute)
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint on disk cannot be used; the message names the file or tensor and the remedy."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. Offsets are absolute positions in the file, in bytes."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset_begin: int
    offset_end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.offset_end - self.offset_begin


@dataclass(frozen=True)
class Header:
    """A checked header: the file it came from, the file's size, and its tensors in file order."""

    path: Path
    size: int
    sha256: str
    tensors: tuple[TensorEntry, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of one file; the data is not touched.

    Raises:
        CheckpointError: the file is missing, truncated, or breaks a rule of the format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Copy or download the complete checkpoint.")
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = _header_json(file, size, path)
    fields = parse_json_object(raw, path)
    _check_metadata(fields.pop("__metadata__", {}), path)
    start = 8 + len(raw)
    entries = [_entry(name, value, path, start, size) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset_begin, entry.offset_end))
    _check_tiling(entries, path, start, size)
    return Header(path, size, hashlib.sha256(raw).hexdigest(), tuple(entries))


def parse_json_object(raw: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `raw`; duplicate keys, other JSON values and deep nesting are refused."""
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its JSON cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise damaged(path, f"its JSON is a {type(content).__name__}, expected an object")
    return content


def damaged(path: Path, problem: str) -> CheckpointError:
    """The error for a file whose bytes are wrong."""
    return CheckpointError(
        f"{path}: {problem}. The file is damaged or incomplete: copy or download it again."
    )


def _header_json(file: BinaryIO, size: int, path: Path) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise damaged(path, f"{size} bytes long, expected at least the 8 bytes of a header length")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(path, f"header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise damaged(path, f"header of {length} bytes in a file of {size} bytes")
    raw = file.read(length)
    if len(raw) != length or raw[:1] != b"{":
        raise damaged(path, "the header is not a JSON object")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {_short(key)}")
        key.encode()  # a lone surrogate is no name: it could be neither printed nor hashed
        result[key] = value
    return result


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "__metadata__ is not a map of strings")


def _entry(name: str, fields: Any, path: Path, start: int, size: int) -> TensorEntry:
    where = f"tensor {_short(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {where} has dtype {_short(dtype)}, expected one of {', '.join(DTYPES)}. "
            "Convert the tensor to one of these, or use a PyTorch version that has the dtype."
        )
    if not _are_naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise damaged(path, f"{where}: shape {_short(shape)} is not a list of sizes")
    if not _are_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{where}: data_offsets {_short(offsets)}, expected [begin, end]")
    begin, end = start + offsets[0], start + offsets[1]
    if end > size:
        raise damaged(path, f"truncated: {where} ends at byte {end}, the file has {size} bytes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise damaged(path, f"{where}: {dtype} {shape} needs {needed} bytes, has {end - begin}")
    return TensorEntry(name, path.name, dtype, tuple(shape), begin, end)


def _check_tiling(entries: Iterable[TensorEntry], path: Path, position: int, size: int) -> None:
    for entry in entries:
        if entry.offset_begin != position:
            problem = "overlaps another" if entry.offset_begin < position else "follows a gap"
            raise damaged(path, f"tensor {_short(entry.name)} {problem}")
        position = entry.offset_end
    if position != size:
        raise damaged(path, f"{size - position} bytes after the last tensor belong to none")


def _are_naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
