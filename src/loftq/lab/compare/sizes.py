"""What the models of a comparison take when they are stored."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from loftq import api
from loftq.lab.compare.cells import Cell
from loftq.lab.compare.store import Bytes
from loftq.methods import METHODS
from loftq.pipeline.accounting import ORIGINAL_ITEMSIZE
from loftq.pipeline.plan import Plan
from loftq.train.config import OPTIMIZERS, TrainConfig

ADAPTER_ITEMSIZE = 4  # float32, as trained adapters are stored; so are gradients
UNPACKED_BITS = 16.0


def plan_cell(cell: Cell, model: str | Path, *, device: str | None = None, **changes: Any) -> Plan:
    """The plan of a cell's backbone; of a baseline, one that tells where its adapters go.

    Args:
        cell: its options decide.
        model: the original model; headers only are read.
        device: that would solve.
        **changes: options over those of the cell.

    Raises:
        ValueError: anything that a quantization would refuse.
    """
    if cell.arm.quantizes:
        # Of a method that calibrates another one has the same bytes and asks for no text.
        calibrates = METHODS[cell.arm.method].needs != "none"
        spared = {"method": "qlora", "data": None} if calibrates else {}
        return api.plan(model, device=device, **{**cell.quantization, **spared, **changes})
    kept = {key: cell.options[key] for key in ("targets", "skip") if key in cell.options}
    # The format is that of nobody: it only has to be one that any layer can have.
    chosen = {"format": "nf4-g64-f32", "rank": cell.rank or 1, **kept, **changes}
    return api.plan(model, device=device, **chosen)


def base_bytes(cell: Cell, plan: Plan) -> Bytes:
    """Bytes of a cell before anything is trained: no head, and of the adapters only their sizes."""
    copied = sum(prod(spec.shape) for spec in plan.copied)
    adapters = ADAPTER_ITEMSIZE * plan.adapter_parameters if cell.arm.adapts else 0
    if cell.arm.quantizes:
        packed, dense = plan.packed_bytes, ORIGINAL_ITEMSIZE * copied
    else:
        packed, dense = 0, ORIGINAL_ITEMSIZE * (copied + plan.weights)
    return Bytes(packed=packed, dense=dense, trained=adapters)


def held_bytes(cell: Cell, stored: Bytes) -> int:
    """Bytes that lie on the device throughout a training: the model, gradients, optimizer states.

    Args:
        cell: says what is trained: adapters, or with `full` every weight, in float32.
        stored: from `base_bytes`; a fresh head is not in it.
    """
    states = OPTIMIZERS[cell.options.get("optimizer", TrainConfig.optimizer)].state_bytes
    each = 2 * ADAPTER_ITEMSIZE + states  # of a number that is trained, with its gradient
    if cell.arm.adapts:
        return stored.packed + stored.dense + each * stored.trained // ADAPTER_ITEMSIZE
    return each * stored.dense // ORIGINAL_ITEMSIZE


def bits_per_weight(cell: Cell, plan: Plan) -> float:
    """Of the linear weights that a method quantizes."""
    return plan.bits_per_weight if cell.arm.quantizes else UNPACKED_BITS
