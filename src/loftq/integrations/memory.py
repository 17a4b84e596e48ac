"""Quantize a model that is already loaded: its linears are replaced one batch at a time."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loftq.calibration import TokenWindows
from loftq.checkpoint import DTYPE_NAMES, TensorEntry, backbone_hash
from loftq.integrations import allocate, artifact, calibrate, discover
from loftq.integrations.blocks import LoadedBlocks
from loftq.integrations.builders import BUILDERS
from loftq.integrations.config import LoftqConfig
from loftq.integrations.tied import share_packed_
from loftq.integrations.transformers import attach
from loftq.nn import pack_layer
from loftq.pipeline.calibration import Statistics
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import ModelLayout
from loftq.pipeline.plan import ADAPTER_PREFIX, Plan, make_plan
from loftq.pipeline.run import OnBatch, adapter_pair
from loftq.pipeline.stream import Solved, solved_batches

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoadedSource:
    """A model in memory, in the place of a checkpoint."""

    model: nn.Module

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every parameter as a checkpoint entry; there is no file, so offsets are sizes."""
        entries = {}
        for name, p in self.model.named_parameters():
            size = math.prod(p.shape) * p.element_size()
            dtype = DTYPE_NAMES[p.dtype]
            entries[name] = TensorEntry(name, "memory", dtype, tuple(p.shape), 0, size)
        return entries

    def read(self, name: str) -> Tensor:
        """The parameter itself."""
        return self.model.get_parameter(name).detach()

    def fingerprint(self) -> str:
        """Nothing is resumed from memory."""
        return ""


def quantize_model(
    model: nn.Module,
    config: QuantizeConfig,
    *,
    device: str | None = None,
    on_batch: OnBatch | None = None,
    tokenizer: Any = None,
) -> PeftModel:
    """As `loftq.quantize_model`, with a ready configuration."""
    if config.resolved_method().refined:
        raise ValueError(
            f"method={config.method}: a refinement reads the original weights from disk again. "
            'Quantize the folder (loftq.quantize), or leave it out with refine="none".'
        )
    layout = discover.describe_model(
        model,
        targets=list(config.targets) or None,
        skip=list(config.skip),
        embeddings=config.embeddings,
        tables=config.tables,
    )
    source = LoadedSource(model)
    where = device or str(next(model.parameters()).device)
    windows = _windows(config, layout, tokenizer, model)
    # Weights in memory have no fingerprint, so that their statistics are nobody else's.
    with tempfile.TemporaryDirectory(prefix="loftq-") as place, ExitStack() as cleanup:
        cleanup.callback(model.train, model.training)
        model.eval()  # what is measured on it knows no dropout
        here = replace(config, statistics=place)
        calibration = calibrate.planned(here, windows, "", where)
        measuring = allocate.Measuring(
            open_blocks=lambda: LoadedBlocks(model), open_model=lambda: model
        )
        choice = allocate.allocated(here, layout, source, windows, where, measuring)
        plan = make_plan(
            config, layout, source, device=where, calibration=calibration, choice=choice
        )
        statistics = None
        if windows is not None and calibration is not None:
            statistics = calibrate.open_statistics(
                plan,
                windows,
                lambda: LoadedBlocks(model),
                recall=lambda layer: None,
                open_whole=lambda: model,
            )
        return _packed(model, plan, source, statistics, on_batch)


def _windows(
    config: QuantizeConfig, layout: ModelLayout, tokenizer: Any, model: nn.Module
) -> TokenWindows | None:
    if config.data is not None and config.text_reader and tokenizer is None:
        raise ValueError(
            f"{config.text_reader} calibrates on {config.data}: pass the model's tokenizer too "
            "(tokenizer=...)."
        )
    return calibrate.read_windows(config, layout, tokenizer, getattr(model, "config", None))


def _packed(
    model: nn.Module,
    plan: Plan,
    source: LoadedSource,
    statistics: Statistics | None,
    on_batch: OnBatch | None,
) -> PeftModel:
    """Solve batch by batch and put the packed weights in place.

    In sequence the model itself is what statistics are taken on: nothing is put in place before the
    last batch is solved, and packed weights add to the dense ones until then.
    """
    solved: Iterable[Solved] = solved_batches(plan, plan.batches, source, statistics)
    if statistics is not None and plan.config.resolved_method().sequential:
        with closing(statistics):
            solved = list(solved)
    factors = {ADAPTER_PREFIX + spec.name: source.read(spec.name).float() for spec in plan.heads}
    hashes: dict[str, str] = {}
    formats: dict[str, str] = {}
    for done in solved:
        batch, solution = done.batch, done.solution
        for i, layer in enumerate(batch.layers):
            home = source.read(layer.info.tensor).device
            packed = pack_layer(model, layer.info.module, solution.quantized[i], builders=BUILDERS)
            packed.to(home)
            formats[layer.info.module] = str(packed.spec)
            pair = adapter_pair(layer, solution.lora_A[i], solution.lora_B[i])
            factors |= {name: tensor.to(home) for name, tensor in pair.items()}
            for part, tensor in solution.quantized[i].to_state_dict().items():
                digest = hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest()
                hashes[f"{layer.stem}.{part}"] = digest
        if on_batch:
            on_batch(batch, [record.to_dict() for record in solution.records], False)
    share_packed_(model)
    attach(model, _config(plan, formats, backbone_hash(hashes)))
    return _with_adapter(model, plan, factors)


def _config(plan: Plan, formats: dict[str, str], backbone: str) -> LoftqConfig:
    return LoftqConfig(
        layers=artifact.layer_entries(plan, formats),
        modules_to_not_convert=artifact.dense_modules(plan),
        backbone=backbone,
        adapter_required=plan.config.resolved_method().adapter_required,
    )


def _with_adapter(model: nn.Module, plan: Plan, factors: dict[str, Tensor]) -> PeftModel:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    values = artifact.adapter_config(plan, getattr(model, "name_or_path", "") or "")
    for key in ("peft_type", "inference_mode"):
        values.pop(key)
    wrapped = get_peft_model(model, LoraConfig(**values))
    outcome = set_peft_model_state_dict(wrapped, factors)
    if outcome.unexpected_keys:
        raise RuntimeError(f"PEFT has no place for {outcome.unexpected_keys[:3]}.")
    return wrapped
