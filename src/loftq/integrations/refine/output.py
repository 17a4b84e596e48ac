"""Refinement of a folder that `quantize` has just written: its start adapter and its records.

The folder holds `.loftq-refine/` from its first complete state on until the refinement is in it.
Until then it is the output of the method without refinement, and loads as that with a warning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.calibration import TokenWindows
from loftq.checkpoint import Checkpoint
from loftq.checkpoint.durable import publish, write_partial
from loftq.integrations import discover
from loftq.integrations.blocks import CheckpointBlocks
from loftq.integrations.peft import PENDING
from loftq.integrations.refine.run import Listener, refine_adapter
from loftq.methods.base import relative_error
from loftq.pipeline.plan import ADAPTER_PREFIX, Plan
from loftq.pipeline.run import RunResult
from loftq.pipeline.stream import oriented

if TYPE_CHECKING:
    from peft import PeftModel

MARK = f"{PENDING}/start.json"
ADAPTER = "init_adapter"
AFTER = ("loftq.json", "README.md")
"""Files that say what became of the layers."""


@dataclass(frozen=True, kw_only=True)
class Refining:
    """A written output that is to be refined."""

    output: Path
    folder: Path
    """Of the original model."""
    source: Checkpoint
    windows: TokenWindows
    extra_files: Callable[[RunResult], Mapping[str, bytes]]
    listener: Listener


def mark(plan: Plan) -> dict[str, bytes]:
    """The file that says that the output of this plan is still to be refined; {} if it is not."""
    if not plan.config.refinement().stages:
        return {}
    return {MARK: (json.dumps({"version": 1, "plan": plan.fingerprint}) + "\n").encode()}


def is_pending(output: Path, plan: Plan) -> bool:
    """Whether `output` is complete but for its refinement, and was made by this very plan."""
    try:
        return json.loads((output / MARK).read_bytes())["plan"] == plan.fingerprint
    except (OSError, ValueError, KeyError):
        return False


def is_begun(output: Path) -> bool:
    """Whether `output` waits for a refinement, whatever the plan that it was made by."""
    return (output / MARK).exists()


def forget(output: Path) -> None:
    """Remove the state of a refinement."""
    shutil.rmtree(output / PENDING, ignore_errors=True)


def written_result(output: Path, plan: Plan) -> RunResult:
    """What the run that wrote `output` has returned, from the files it wrote."""
    record = json.loads((output / "loftq.json").read_bytes())
    added = ("tensor", "kind", "shape")
    return RunResult(
        plan=plan,
        records=tuple({k: v for k, v in x.items() if k not in added} for x in record["layers"]),
        hashes=record["tensors"],
        backbone=record["backbone"],
        timings=json.loads((output / "timings.json").read_bytes()),
    )


def refine_output(work: Refining, result: RunResult) -> RunResult:
    """Refine the start adapter of an output; an interrupted refinement goes on.

    Args:
        work: the output and what it was made from.
        result: of the run that wrote it.

    Returns:
        The result with the errors and hashes of the refined adapter, which is in the folder.
    """
    plan = result.plan
    device = torch.device(plan.device)
    model = _load(work.output, device)
    rows = refine_adapter(
        model,
        plan.config.refinement(),
        work.windows,
        lambda: CheckpointBlocks(work.folder, work.source, device),
        state=work.output / PENDING,
        device=device,
        seed=plan.config.seed,
        listener=work.listener,
    )
    tensors = _adapter_tensors(model)
    refined = replace(
        result,
        records=_records(result, model, work.source, device),
        hashes={**result.hashes, **{name: _sha256(t) for name, t in tensors.items()}},
        refinement=tuple(rows),
    )
    _write(work, refined, tensors)
    forget(work.output)
    return refined


def _load(output: Path, device: torch.device) -> PeftModel:
    """In host memory, in the dtype that the original model runs in."""
    from peft import PeftModel

    options = {"dtype": torch.float32} if device.type == "cpu" else {}
    base = discover.model_class(output).from_pretrained(output, **options)
    return PeftModel.from_pretrained(base, str(output / ADAPTER), is_trainable=True)


def _adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The factors under the names of the adapter file, float32 on the host."""
    return {
        ADAPTER_PREFIX + name.replace(".default.", "."): p.detach().float().cpu().contiguous()
        for name, p in model.get_base_model().named_parameters()
        if p.requires_grad and ".lora_" in name
    }


def _records(
    result: RunResult, model: PeftModel, source: Checkpoint, device: torch.device
) -> tuple[Mapping[str, Any], ...]:
    """Records with the error of what is stored now; that of the outputs is known of blocks."""
    name, records = result.plan.config.refinement().name, []
    for layer, record in zip(result.plan.layers, result.records, strict=True):
        if not layer.rank:
            records.append(record)
            continue
        module = model.get_base_model().get_submodule(layer.info.module)
        A, B = (getattr(module, f"lora_{x}")["default"].weight.detach() for x in "AB")
        W = oriented(source.read(layer.info.tensor).float(), layer.info)
        Q = module.base_layer.quantized().dequantize()
        W, Q, A, B = (X.to(device) for X in (W, Q, A, B))
        error = relative_error(W, Q, B, A, result.plan.config.scaling)
        notes = [*record["notes"], f"refined: {name}"]
        records.append({**record, "error": error, "output_error": None, "notes": notes})
    return tuple(records)


def _write(work: Refining, result: RunResult, tensors: Mapping[str, Tensor]) -> None:
    """The adapter, in the layout of the one it replaces, then the files about it."""
    shard = result.plan.shards[-1]
    path = work.output / shard.filename
    data = bytearray(path.read_bytes())
    for name, tensor in tensors.items():
        entry = shard.tensors[name]
        data[entry.offset_begin : entry.offset_begin + entry.nbytes] = tensor.numpy().tobytes()
    files = work.extra_files(result)
    write_partial(path, bytes(data))
    publish(path)
    for about in AFTER:
        write_partial(work.output / about, files[about])
        publish(work.output / about)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
