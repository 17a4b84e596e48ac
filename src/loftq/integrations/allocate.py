"""A measured allocation of a transformers model: what is known is read, what is not is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq.allocation import Choice, CostTable
from loftq.allocation.base import OutputCost
from loftq.calibration import BlockModel, TokenWindows
from loftq.integrations import calibrate
from loftq.ops.precision import full_float32
from loftq.pipeline.allocate import (
    Cost,
    Gaps,
    OnCost,
    costs_fingerprint,
    decide,
    measure,
    residual_cost,
    sharing_layers,
    uniform,
)
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import LayerInfo, ModelLayout
from loftq.pipeline.plan import PlanError, Source, make_plan
from loftq.pipeline.stream import oriented


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How the costs that are not known yet may be found."""

    open_blocks: Callable[[], BlockModel]
    """For statistics of the inputs."""
    open_model: Callable[[], nn.Module]
    """The whole model with its head, dense, on the device; for costs of its outputs."""
    on_block: calibrate.OnBlock = lambda path, done, total: None
    on_cost: OnCost = lambda layer, done, total: None


def allocated(
    config: QuantizeConfig,
    layout: ModelLayout,
    source: Source,
    windows: TokenWindows | None,
    device: str,
    measuring: Measuring | None,
) -> Choice | None:
    """What the configuration's allocation chooses; None where it measures nothing.

    Args:
        config: the choices.
        layout: of the model.
        source: its weights.
        windows: the calibration text.
        device: that solves.
        measuring: how to fill the table of costs, or None to use it as it is.

    Raises:
        PlanError: no text for costs that need it, a model without next tokens, no layers, a table
            with gaps that may not be filled, or whatever a uniform plan would complain about.
        ValueError: a budget below the narrowest candidates.
    """
    row = config.allocation_row()
    if not row.measured:
        return None
    _check(config, layout, windows)
    tables = {
        rank: CostTable(_place(config, rank, source, windows, device)) for rank in config.all_ranks
    }
    layers = sharing_layers(config, layout)
    names, specs = [info.module for info in layers], config.candidate_formats()
    todo = [
        (table, spec, rank)
        for rank, table in tables.items()
        for spec in specs
        if table.missing(names, str(spec))
    ]
    if todo and measuring is None:
        gaps = sum(len(table.missing(names, str(spec))) for table, spec, _ in todo)
        raise PlanError(
            f"allocation={config.allocation}: {gaps} of {len(names) * len(specs) * len(tables)} "
            "costs are not measured yet. `loftq plan --measure` does so and keeps them, and so "
            "does `loftq quantize`."
        )
    if todo:
        assert measuring is not None
        gaps_of = []
        for table, spec, rank in todo:
            alone = uniform(config, spec, rank)
            known = calibrate.planned(alone, windows, source.fingerprint(), device)
            plan = make_plan(alone, layout, source, device=device, calibration=known)
            gaps_of.append(Gaps(table, str(spec), plan))
        _fill(config, gaps_of, layers, source, windows, measuring)
    return decide(config, layout, tables)


def _place(
    config: QuantizeConfig, rank: int, source: Source, windows: TokenWindows | None, device: str
) -> Path:
    fingerprint = costs_fingerprint(
        config, rank, source=source.fingerprint(), tokens=_tokens(config, windows), device=device
    )
    folder = calibrate.statistics_folder(config) / "costs"
    return folder / f"{config.allocation}-{fingerprint}.jsonl"


def _fill(
    config: QuantizeConfig,
    gaps: Sequence[Gaps],
    layers: list[LayerInfo],
    source: Source,
    windows: TokenWindows | None,
    measuring: Measuring,
) -> None:
    plan, statistics, row = gaps[0].plan, None, config.allocation_row()
    if plan.calibration is not None:
        assert windows is not None
        statistics = calibrate.take_statistics(
            plan,
            windows,
            measuring.open_blocks,
            on_block=measuring.on_block,
            open_whole=measuring.open_model,
        )
    if row.of_residual is not None:
        cost = residual_cost(plan, source, statistics, row.of_residual)
    else:
        assert windows is not None
        assert row.of_outputs is not None
        cost = output_cost(measuring.open_model(), _first(windows, config), row.of_outputs)
    measure(gaps, layers, source, statistics, cost, on_cost=measuring.on_cost)


def output_cost(model: nn.Module, windows: TokenWindows, of_outputs: OutputCost) -> Cost:
    """The cost of packing one layer of a dense model alone, by its logits; all else as it is.

    The model's own logits are kept, 4 bytes for each token and word of the vocabulary.

    Args:
        model: causal, in eval mode; a layer's weight is exchanged for one forward and put back.
        windows: full windows of text.
        of_outputs: from the logits.
    """
    device = next(model.parameters()).device

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad(), full_float32():
            return model(input_ids=ids[None].to(device), use_cache=False).logits[0].float()

    reference = [logits(ids) for ids in windows.ids]
    tokens = windows.ids.numel()

    def cost(info: LayerInfo, effective: Tensor) -> float:
        weight = model.get_submodule(info.module).weight
        assert isinstance(weight, Tensor)
        kept = weight.detach().clone()
        try:
            weight.data.copy_(oriented(effective, info))
            pairs = zip(reference, windows.ids, strict=True)
            return sum(of_outputs(known, logits(ids)).item() for known, ids in pairs) / tokens
        finally:
            weight.data.copy_(kept)

    return cost


def _check(config: QuantizeConfig, layout: ModelLayout, windows: TokenWindows | None) -> None:
    row = config.allocation_row()
    if not sharing_layers(config, layout):
        raise PlanError(
            f"allocation={row.name}: no layer is left to choose a format for. Name fewer in "
            "formats, or others in targets."
        )
    if config.cost_config().resolved_method().sequential:
        raise PlanError(
            f"allocation={row.name}: {config.costs_by or config.method} solves a layer with all "
            "before it quantized, so that no layer has a cost of its own. Take the costs of "
            "another method: costs_by=fast."
        )
    if row.reads_text and layout.task_type != "CAUSAL_LM":
        raise PlanError(
            f"allocation={row.name}: {layout.architecture} predicts no next token. Choose "
            "allocation=error or relative."
        )
    if row.reads_text and windows is None:
        raise PlanError(
            f"allocation={row.name}: needs text to measure on. Give a file with --data (.txt, .raw "
            "or .jsonl, also .gz; not a test split), or choose allocation=error, which needs none "
            "where the method needs none."
        )


def _first(windows: TokenWindows, config: QuantizeConfig) -> TokenWindows:
    """The windows that the outputs are compared on."""
    n = config.allocation_windows
    return replace(windows, ids=windows.ids[:n], mask=windows.mask[:n])


def _tokens(config: QuantizeConfig, windows: TokenWindows | None) -> str:
    """Identity of the text behind the costs."""
    if windows is None:
        return ""
    calibrated = config.cost_config().resolved_method().needs != "none"
    read = windows.fingerprint if calibrated else ""
    if config.allocation_row().reads_text:
        read += _first(windows, config).fingerprint
    return read
