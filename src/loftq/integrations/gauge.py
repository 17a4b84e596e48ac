"""Other factors of the same start: (B O^T)(O A) = B A for every orthogonal O.

A calibrated start has one best product B A, so that every seed would begin at the same place. The
product leaves the factors free up to an invertible matrix; an orthogonal one keeps their sizes. The
model is the same function, and gradients of A and B differ: members of an ensemble part from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq.integrations.peft import LineageError, read_lineage, write_lineage
from loftq.integrations.run_folder import START, RunFolder

WEIGHTS = "adapter_model.safetensors"
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""Ends of the names of A (rank, in) and B (out, rank) in an adapter file."""


def rotated_start(base: Path, folder: Path, *, seed: int) -> Path:
    """A folder that `loftq train` goes on from: the start of `base` in other factors.

    It has what a run has that a new one begins with: base.json and adapter/.

    Args:
        base: output of `loftq quantize`.
        folder: to be made.
        seed: of the rotations, one for each layer; 0 is one as any other.

    Raises:
        LineageError: the start does not say which backbone it belongs to.
        FileExistsError: `folder` is there.
    """
    start, run = base / START, RunFolder(folder)
    backbone = read_lineage(start)
    if backbone is None:
        raise LineageError(f"{start}: nothing says which backbone it belongs to. Quantize again.")
    run.adapter.mkdir(parents=True)
    for path in start.iterdir():
        if path.is_file() and path.name != WEIGHTS:
            shutil.copy2(path, run.adapter / path.name)
    _name_base(run.adapter / "adapter_config.json", base)
    tensors = rotate(load_file(start / WEIGHTS), seed=seed)
    save_file(tensors, run.adapter / WEIGHTS, metadata={"format": "pt"})
    write_lineage(run.adapter, backbone)
    record = {
        "path": str(base.resolve()), "backbone": backbone, "model": str(base),
        "start": str(start.resolve()), "gauge": seed,
    }  # fmt: skip
    (folder / "base.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def _name_base(file: Path, base: Path) -> None:
    """Point PEFT's record at the backbone by its whole path, as base.json does."""
    found = json.loads(file.read_text(encoding="utf-8"))
    found["base_model_name_or_path"] = str(base.resolve())
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def rotate(tensors: dict[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """The tensors of an adapter file with O A in place of A and B O^T in place of B.

    Args:
        tensors: by PEFT's names; those that are no factors are passed on.
        seed: with the name of a layer it decides O, so that the order of the file does not matter.

    Returns:
        New tensors of the same dtypes; products are equal to the precision of that dtype.
    """
    found = dict(tensors)
    for name_a, name_b in _pairs(tensors):
        A, B = tensors[name_a].double(), tensors[name_b].double()
        digest = hashlib.sha256(f"{seed}:{name_a}".encode()).digest()
        O = random_orthogonal(len(A), int.from_bytes(digest[:7], "little"))
        found[name_a] = (O @ A).to(tensors[name_a].dtype).contiguous()
        found[name_b] = (B @ O.T).to(tensors[name_b].dtype).contiguous()
    return found


def random_orthogonal(size: int, seed: int) -> Tensor:
    """A matrix (size, size) float64 from Haar's measure on the orthogonal group.

    Q of a Gaussian's QR, its columns signed by R's diagonal (Mezzadri, arXiv:math-ph/0609050).
    """
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def _pairs(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    for end_a, end_b in PAIRS:
        for name in tensors:
            if name.endswith(end_a):
                yield name, name.removesuffix(end_a) + end_b
