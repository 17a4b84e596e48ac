"""Singular values of what rounding leaves over, of a few layers of an output.

All are divided by ||W||_F, so that the root of their sum of squares is the relative error that the
record names. A correction of rank r takes the r largest away: a steep start means much to gain from
few ranks, a flat spectrum that more ranks gain little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from loftq.integrations.source import local_source
from loftq.report.output import OutputFiles, RecordedLayer
from loftq.report.verify import stored_parts
from loftq.rounding import round_to_nearest

MOST_WORK = 1e11
"""Multiplications in the Gram matrix of a residual: a square layer of 4096 has 7e10."""


class SourceMissing(ValueError):
    """The model that an output was made from is not on this machine."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one layer's residuals over ||W||_F, largest first."""

    module: str
    rank: int
    """Of the adapter."""
    plain: tuple[float, ...]
    """W - q(W): rounding alone."""
    backbone: tuple[float, ...]
    """W - Q: the backbone without its adapter."""
    adapted: tuple[float, ...]
    """W - Q - scaling B A: the backbone with the start adapter."""


def typical_layers(files: OutputFiles) -> tuple[str, ...]:
    """The layers with the largest, the middle and the smallest error, at most three.

    Layers beyond MOST_WORK are passed over on a CPU, where three of them would take minutes; the
    smallest layer is taken if all of them are.
    """
    corrected = (layer for layer in files.layers if layer.record["rank"])
    layers = sorted(corrected, key=lambda layer: -layer.record["error"])
    ranked = [x for x in layers if _device(files) != "cpu" or _work(x) <= MOST_WORK]
    if not ranked:
        return (min(layers, key=_work).info.module,)
    names = [ranked[i].info.module for i in (0, len(ranked) // 2, len(ranked) - 1)]
    return tuple(dict.fromkeys(names))


def residual_spectra(
    files: OutputFiles, origin: Checkpoint, modules: Sequence[str]
) -> tuple[Spectrum, ...]:
    """Singular values of the residuals of `modules`, from the files of output and source.

    Args:
        files: the output.
        origin: the model it was made from.
        modules: paths of packed modules.

    Raises:
        ValueError: a module that is not in the output.
    """
    known = {layer.info.module: layer for layer in files.layers}
    unknown = [module for module in modules if module not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: no packed layer of {files.folder}. `loftq inspect` lists them."
        )
    return tuple(_spectrum(known[module], files, origin) for module in modules)


def origin_of(files: OutputFiles, given: str | None = None) -> Checkpoint:
    """The model that an output was made from, if it is on this machine; nothing is downloaded.

    Args:
        files: the output.
        given: where to look; None = where loftq.json says, or in the hub cache.

    Raises:
        SourceMissing: not here, unreadable, or another model.
    """
    name = given or str(files.record["source"].get("name"))
    folder = local_source(name)
    if folder is None:
        raise SourceMissing(f"the source, {name}, is not on this machine")
    try:
        origin = open_checkpoint(folder)
    except (CheckpointError, OSError) as error:
        raise SourceMissing(f"the source cannot be read ({error})") from error
    if origin.fingerprint() != files.record["source"].get("fingerprint"):
        raise SourceMissing(f"{name} is not the model that was quantized: its fingerprint differs")
    return origin


def _spectrum(layer: RecordedLayer, files: OutputFiles, origin: Checkpoint) -> Spectrum:
    parts = stored_parts(layer, files, origin)
    W, Q, B, A = (tensor.to(_device(files)) for tensor in parts)
    scale_fit = layer.record["scale_fit"]
    rounded = round_to_nearest(W[None], layer.spec, fit=scale_fit)[1][0]
    norm = W.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    residuals = (W - rounded, W - Q, W - Q - layer.record["scaling"] * (B @ A))
    plain, backbone, adapted = (tuple((_values(E) / norm).tolist()) for E in residuals)
    return Spectrum(
        module=layer.info.module,
        rank=layer.record["rank"],
        plain=plain,
        backbone=backbone,
        adapted=adapted,
    )


def _device(files: OutputFiles) -> str:
    """The device that made the output if it is here, else the CPU."""
    made_on = str(files.record.get("device", "cpu"))
    return made_on if made_on.startswith("cuda") and torch.cuda.is_available() else "cpu"


def _work(layer: RecordedLayer) -> float:
    return float(layer.weights) * min(layer.info.shape)


def _values(E: Tensor) -> Tensor:
    """Singular values, largest first, from the smaller Gram matrix in float64.

    Several times faster than an SVD; squaring costs half the digits, of which a plot shows three.
    """
    E = E if E.shape[0] <= E.shape[1] else E.mT
    E = E.double()
    return torch.linalg.eigvalsh(E @ E.mT).clamp_min(0).sqrt().flip(0)
