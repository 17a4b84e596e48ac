"""The Python front door: quantize to disk or in memory, load, refine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq.allocation import MEASURED
from loftq.calibration import BlockModel, TokenWindows
from loftq.checkpoint import Checkpoint, open_checkpoint
from loftq.integrations import allocate, artifact, calibrate, discover, memory, refine
from loftq.integrations.device import check_device, default_device
from loftq.integrations.export import export
from loftq.integrations.greedy import greedy_adapter
from loftq.integrations.peft import load_adapter
from loftq.pipeline.allocate import OnCost
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import ModelLayout
from loftq.pipeline.plan import Plan, make_plan
from loftq.pipeline.run import JOURNAL, OnBatch, OpenStatistics, RunResult, run

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["export", "greedy_adapter", "load", "plan", "quantize", "quantize_model"]


def plan(
    model: str | Path,
    *,
    device: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    measure: bool = False,
    on_block: calibrate.OnBlock = lambda path, done, total: None,
    on_cost: OnCost = lambda layer, done, total: None,
    **options: Any,
) -> Plan:
    """What `quantize` would do with the same arguments; reads headers only.

    Args:
        model: as of `quantize`, like device, max_shard_bytes, on_block, on_cost and **options.
        measure: read the weights too, and measure the costs that an allocation needs and does not
            find; they are kept.

    Raises:
        PlanError: every problem at once.
        ValueError: an unknown option, format or method, or an unusable source.
    """
    chosen = device or default_device()
    if torch.cuda.is_available() or not chosen.startswith("cuda"):
        check_device(chosen)  # else it is a plan for another machine
    if measure and not _config(options).allocation_row().measured:
        raise ValueError(
            "measure: this allocation goes by depth and has no costs. Choose one that has: "
            f"{', '.join(MEASURED)}."
        )
    follow = (on_block, on_cost) if measure else None
    return _prepare(model, chosen, max_shard_bytes, options, follow).plan


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    device: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    on_plan: Callable[[Plan], object] | None = None,
    on_batch: OnBatch | None = None,
    on_block: calibrate.OnBlock = lambda path, done, total: None,
    on_cost: OnCost = lambda layer, done, total: None,
    on_refine: refine.Listener = lambda step: None,
    **options: Any,
) -> RunResult:
    """Quantize a pretrained model into `output`: packed backbone, start adapter, records.

    Called again after an interruption it continues, and ends in the same bytes.

    Args:
        model: folder with safetensors, or hub id.
        output: folder to be made (DESIGN: config.json, loftq-*.safetensors, init_adapter/, ...).
        device: "cpu", "cuda", ...; None = the GPU if there is one.
        max_shard_bytes: size at which the weights are split over files.
        overwrite: replace a finished output that was made with other settings.
        on_plan: called with the plan before anything is written.
        on_batch: called after each batch (pipeline.run.OnBatch).
        on_block: called when the statistics of a block are taken (calibrate.OnBlock).
        on_cost: called when a layer's cost is measured for an allocation (allocate.OnCost), before
            the plan is made.
        on_refine: called after each step of a refinement (integrations.refine.Step).
        **options: fields of `QuantizeConfig`: method, bits, format, rank, alpha, skip, data, ...

    Returns:
        RunResult: the plan, a record per layer, hashes, seconds.

    Raises:
        ValueError: bad options, an unusable source, a NaN in a weight, output = input; each
            message names the tensor or file and the remedy.
    """
    chosen = device or default_device()
    check_device(chosen)
    config, target = _config(options), Path(output)
    if config.allocation_row().measured and not refine.is_begun(target):  # planning takes minutes
        _check_output(discover.resolve_source(model), target, overwrite=overwrite)
    ready = _prepare(model, chosen, max_shard_bytes, options, (on_block, on_cost))
    planned = ready.plan
    pending = refine.is_pending(target, planned) and not (target / JOURNAL).exists()
    if not pending:
        _check_output(ready.folder, target, overwrite=overwrite)
    if on_plan is not None:
        on_plan(planned)

    def about(result: RunResult) -> dict[str, bytes]:
        return artifact.extra_files(result, ready.folder, str(model), str(output))

    if pending:
        result = refine.written_result(target, planned)
    else:
        result = _solve(ready, target, about, on_batch, ready.open_statistics(on_block))
    if not planned.config.refinement().stages:
        return result
    assert ready.windows is not None, "the plan refuses a refinement without text"
    work = refine.Refining(
        output=target,
        folder=ready.folder,
        source=ready.source,
        windows=ready.windows,
        extra_files=about,
        listener=on_refine,
    )
    return refine.refine_output(work, result)


def quantize_model(
    model: nn.Module,
    *,
    device: str | None = None,
    on_batch: OnBatch | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> PeftModel:
    """Quantize a loaded transformers model in place and attach the adapters.

    Args:
        model: a full-precision model; its linears are replaced one batch at a time.
        device: where to solve; None = where the model's weights are.
        on_batch: progress.
        tokenizer: of the model, for methods that calibrate on `data`.
        **options: fields of `QuantizeConfig`.

    Returns:
        A PEFT model whose adapter is trainable and starts where the full-precision model was.
    """
    return memory.quantize_model(
        model, _config(options), device=device, on_batch=on_batch, tokenizer=tokenizer
    )


def load(
    path: str | Path,
    *,
    trainable: bool = False,
    adapter: str | Path | None = None,
    embedding: str = "device",
    **kwargs: Any,
) -> PeftModel:
    """The packed model of a folder made by `quantize`, with its adapter, as a PEFT model.

    Args:
        path: output folder of `quantize`, or its hub id.
        trainable: whether the adapter is to be trained.
        adapter: adapter folder; None = the start adapter (path/init_adapter). One that belongs to
            another backbone is refused.
        embedding: "host" keeps the token embedding in host memory and moves the rows that a batch
            looks up; refused where the head shares the table. "device": with the rest.
        **kwargs: passed to transformers' from_pretrained (dtype, device_map, ...).
    """
    folder = discover.resolve_source(path)
    base = load_base(folder, embedding=embedding, **kwargs)
    chosen = Path(adapter) if adapter is not None else folder / "init_adapter"
    return load_adapter(base, chosen, trainable=trainable)


def load_base(folder: Path, *, embedding: str = "device", **kwargs: Any) -> PreTrainedModel:
    """The packed model alone, in the class its config names; `embedding` as in `load`."""
    from loftq.integrations.host import PLACES, keep_on_host_, one_device

    if embedding not in PLACES:
        raise ValueError(f"embedding={embedding!r}: choose one of {', '.join(PLACES)}.")
    model_class = discover.model_class(folder)
    if embedding == "device":
        return model_class.from_pretrained(folder, **kwargs)
    device = one_device(kwargs.pop("device_map", None))
    model = model_class.from_pretrained(folder, **kwargs)
    keep_on_host_(model)  # before the move, so that the table never is on the device
    return model if device is None else model.to(device)


@dataclass(frozen=True)
class _Ready:
    """A model that can be quantized."""

    folder: Path
    source: Checkpoint
    plan: Plan
    windows: TokenWindows | None

    def open_statistics(self, on_block: calibrate.OnBlock) -> OpenStatistics | None:
        """Gives those that the plan needs, taken as far as they are not kept already."""
        windows = self.windows
        if windows is None or self.plan.calibration is None:
            return None
        return lambda recall: calibrate.open_statistics(
            self.plan,
            windows,
            lambda: _blocks(self.folder, self.source, self.plan.device),
            recall=recall,
            on_block=on_block,
            open_whole=lambda: _whole(self.folder, self.plan.device),
        )


def _solve(
    ready: _Ready,
    target: Path,
    about: Callable[[RunResult], dict[str, bytes]],
    on_batch: OnBatch | None,
    open_statistics: OpenStatistics | None,
) -> RunResult:
    """Write the output, marked as unfinished where a refinement is to follow."""
    planned = ready.plan
    refine.forget(target)
    result = run(
        planned,
        ready.source,
        target,
        extra_files=lambda result: {**refine.mark(planned), **about(result)},
        on_batch=on_batch,
        open_statistics=open_statistics,
    )
    _remove_stale_shards(target, planned)
    return result


def _blocks(folder: Path, source: Checkpoint, device: str) -> BlockModel:
    from loftq.integrations.blocks import CheckpointBlocks

    return CheckpointBlocks(folder, source, torch.device(device))


def _prepare(
    model: str | Path,
    device: str,
    max_shard_bytes: int,
    options: Mapping[str, Any],
    follow: tuple[calibrate.OnBlock, OnCost] | None,
) -> _Ready:
    """Everything up to the plan; with `follow` what an allocation lacks is measured."""
    config = _config(options)
    folder = discover.resolve_source(model)
    discover.refuse_unusable(folder)
    source = open_checkpoint(folder)
    layout = discover.describe_folder(
        folder,
        {name: entry.shape for name, entry in source.tensors.items()},
        targets=list(config.targets) or None,
        skip=list(config.skip),
        embeddings=config.embeddings,
        tables=config.tables,
    )
    windows = _windows(config, layout, folder)
    measuring = None
    if follow is not None:
        measuring = allocate.Measuring(
            open_blocks=lambda: _blocks(folder, source, device),
            open_model=lambda: _whole(folder, device),
            on_block=follow[0],
            on_cost=follow[1],
        )
    planned = make_plan(
        config,
        layout,
        source,
        device=device,
        max_shard_bytes=max_shard_bytes,
        calibration=calibrate.planned(config, windows, source.fingerprint(), device),
        choice=allocate.allocated(config, layout, source, windows, device, measuring),
    )
    return _Ready(folder, source, planned, windows)


def _whole(folder: Path, device: str) -> PreTrainedModel:
    """The dense model with its head, in float32."""
    model = discover.model_class(folder).from_pretrained(folder, dtype=torch.float32)
    return model.eval().to(device)


def _windows(config: QuantizeConfig, layout: ModelLayout, folder: Path) -> TokenWindows | None:
    """Calibration tokens; the tokenizer is loaded only where they are needed."""
    if config.data is None or not config.text_reader:
        return None
    tokenizer = discover.load_tokenizer(folder)
    return calibrate.read_windows(config, layout, tokenizer, discover.load_config(folder))


def _remove_stale_shards(output: Path, planned: Plan) -> None:
    """Take away the weight files of an output that was overwritten."""
    kept = {shard.filename for shard in planned.shards}
    for stale in output.glob("loftq-?????-of-?????.safetensors"):
        if stale.name not in kept:
            stale.unlink()


def _check_output(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse to write over the source, a finished model, or something that is not ours."""
    if output.resolve() == source.resolve():
        raise ValueError(f"{output}: output and input are the same folder. Choose another with -o.")
    if (output / JOURNAL).exists() or not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        state = "holds a finished model" if (output / "loftq.json").exists() else "is not empty"
        raise ValueError(
            f"{output}: {state}. Choose another folder, or replace its contents with --overwrite."
        )
    if not (output / "loftq.json").exists():
        raise ValueError(
            f"{output}: holds files that loftq did not write, so --overwrite will not touch it. "
            "Empty it yourself or choose another folder."
        )


def _config(options: Mapping[str, Any]) -> QuantizeConfig:
    config = QuantizeConfig.from_dict(options)
    return replace(config, targets=tuple(config.targets), skip=tuple(config.skip))
