"""Calibration of a transformers model: its tokenizer cuts the text, its own forward runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from loftq.calibration import (
    BlockModel,
    FisherStore,
    Recall,
    SequentialStatistics,
    StatisticsStore,
    TokenWindows,
    collect,
    collect_fisher,
    default_folder,
    document_windows,
    layers_in,
    statistics_fingerprint,
    stream_windows,
)
from loftq.integrations.structure import text_config
from loftq.ops.precision import full_float32
from loftq.pipeline.calibration import Calibration, Statistics
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.layout import ModelLayout
from loftq.pipeline.plan import Plan

FEW_TOKENS, MANY_TOKENS = 1 << 13, 1 << 15  # in one forward on a GPU: they keep it busy
SMALL_BYTES = 1 << 32  # as much as a forward may take where more than FEW_TOKENS are in flight
COPIES = 96  # bytes of a GPU for each input of the widest layer and each token in flight

OnBlock = Callable[[str, int, int], object]
"""Called when the statistics of a block are taken: its path, blocks done, blocks in all."""


def read_windows(
    config: QuantizeConfig, layout: ModelLayout, tokenizer: Any, model_config: Any
) -> TokenWindows | None:
    """The calibration tokens of a configuration; None where nothing needs any, or has no text.

    A causal model reads one stream in full windows. All others read document by document, with
    their special tokens, padded to the longest; the padding is masked.

    Raises:
        ValueError: a file that cannot be used (calibration/data.py), or a tokenizer without the
            padding token that documents need.
    """
    if config.data is None or not config.text_reader:
        return None
    context = min(config.calibration_context, _longest(tokenizer, model_config))
    shape = {"windows": config.calibration_windows, "context": context}

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False)["input_ids"]

    if layout.task_type == "CAUSAL_LM":
        return stream_windows(config.data, encode, **shape)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{config.data}: documents of different lengths need a padding token, and the "
            "tokenizer of this model has none. Set its pad_token."
        )

    def cut(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=context)["input_ids"]

    return document_windows(config.data, cut, pad=tokenizer.pad_token_id, **shape)


def planned(
    config: QuantizeConfig, windows: TokenWindows | None, source_fingerprint: str, device: str
) -> Calibration | None:
    """What the plan has to know of these tokens."""
    if windows is None or config.resolved_method().needs == "none":
        return None
    name = statistics_fingerprint(
        source=source_fingerprint, tokens=windows.fingerprint, device=device
    )
    return Calibration(
        kind=config.resolved_method().needs,
        source=windows.source,
        windows=windows.ids.shape[0],
        context=windows.ids.shape[1],
        tokens=windows.tokens,
        folder=str(statistics_folder(config)),
        fingerprint=name,
    )


def statistics_folder(config: QuantizeConfig) -> Path:
    """Where statistics and costs are kept."""
    return Path(config.statistics).expanduser() if config.statistics else default_folder()


def open_statistics(
    plan: Plan,
    windows: TokenWindows,
    open_model: Callable[[], BlockModel],
    *,
    recall: Recall,
    on_block: OnBlock = lambda path, done, total: None,
    open_whole: Callable[[], nn.Module] | None = None,
) -> Statistics:
    """The statistics that a plan needs: all of the original model, or layer after layer.

    Args:
        plan, windows, open_model, on_block, open_whole: see `take_statistics`.
        recall: gives layers that an earlier run has solved (calibration/sequence.py).
    """
    if not plan.config.resolved_method().sequential:
        return take_statistics(plan, windows, open_model, on_block=on_block, open_whole=open_whole)
    assert plan.calibration is not None
    layers = _read_layers(plan)
    _warn_of_few_tokens(plan.calibration, layers)
    context, widest = plan.calibration.context, max(layers.values())
    chunk = windows_at_once(torch.device(plan.device), context, widest)
    return SequentialStatistics(
        open_model, layers, windows, recall=recall, on_block=on_block, chunk=chunk
    )


def take_statistics(
    plan: Plan,
    windows: TokenWindows,
    open_model: Callable[[], BlockModel],
    *,
    on_block: OnBlock = lambda path, done, total: None,
    open_whole: Callable[[], nn.Module] | None = None,
) -> StatisticsStore:
    """The statistics that a plan needs, read from its folder as far as they are there.

    Args:
        plan: with a calibration.
        windows: the tokens it was planned with.
        open_model: makes the model, called only where a block is missing.
        on_block: progress.
        open_whole: makes the dense model with its head, for a method that needs gradients.
    """
    calibration = plan.calibration
    assert calibration is not None
    if calibration.kind == "fisher":
        assert open_whole is not None, "Fisher means need the whole model"
        inputs = replace(plan, calibration=replace(calibration, kind="diagonal"))
        take_statistics(inputs, windows, open_model, on_block=on_block)
        return _take_fisher(plan, windows, open_whole, on_block)
    store = StatisticsStore(Path(calibration.folder), calibration.fingerprint)
    layers = _read_layers(plan)
    _warn_of_few_tokens(calibration, layers)
    if store.holds(layers, calibration.kind):
        return store
    model = open_model()
    done = 0
    pending: Future[None] | None = None

    def known(block: str) -> bool:
        inside = layers_in(block, layers, model.blocks)
        return bool(inside) and store.has(block, inside, calibration.kind)

    def keep(block: str, statistics: Any, leaders: Any) -> None:
        nonlocal done, pending
        done += 1
        packed = store.packed(block, statistics, leaders)
        if pending is not None:
            pending.result()  # at most one block waits for the disk
        pending = writer.submit(packed)
        on_block(block, done, len(model.blocks))

    chunk = windows_at_once(model.device, calibration.context, max(layers.values()))
    with full_float32(), ThreadPoolExecutor(1, thread_name_prefix="statistics") as writer:
        collect(model, layers, windows, calibration.kind, on_block=keep, skip=known, chunk=chunk)
        if pending is not None:
            pending.result()
    return store


def _take_fisher(
    plan: Plan, windows: TokenWindows, open_whole: Callable[[], nn.Module], on_block: OnBlock
) -> FisherStore:
    """The Fisher means of a plan's layers, by the loss of the next token on each window."""
    assert plan.calibration is not None
    store = FisherStore(Path(plan.calibration.folder), plan.calibration.fingerprint)
    layers = {x.info.module: x.info.kind == "conv1d" for x in plan.layers if x.rank}
    if store.holds_fisher(layers):
        return store
    model = open_whole()
    device = next(model.parameters()).device

    def loss(ids: torch.Tensor) -> torch.Tensor:
        ids = ids[None].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return cross_entropy(logits, ids[0, 1:])

    total = len(windows.ids)
    with full_float32():
        found = collect_fisher(
            model,
            [partial(loss, ids) for ids in windows.ids],
            layers,
            on_loss=lambda done: on_block("gradients", done, total),
        )
    store.write_fisher(found)
    return store


def windows_at_once(device: torch.device, context: int, widest: int) -> int:
    """Windows in one forward: a GPU is busy with FEW_TOKENS of a large model, a CPU with less.

    A forward of few tokens through a small model waits for the host, layer by layer.

    Args:
        device: that runs.
        context: tokens of a window.
        widest: inputs of the widest layer.
    """
    if device.type == "cpu":
        return 4
    free, _ = torch.cuda.mem_get_info(device)
    token = COPIES * widest
    tokens = min(MANY_TOKENS, max(FEW_TOKENS, SMALL_BYTES // token))
    return max(1, min(tokens, free // token) // context)


def _read_layers(plan: Plan) -> dict[str, int]:
    """Path -> in_features; a table without an adapter is only rounded, whatever its inputs."""
    return {layer.info.module: layer.info.shape[1] for layer in plan.layers if layer.rank}


def _warn_of_few_tokens(calibration: Calibration, layers: dict[str, int]) -> None:
    widest = max(layers.values())
    if calibration.kind == "gram" and calibration.tokens < widest:
        warnings.warn(
            f"{calibration.source}: {calibration.tokens} tokens are fewer than the {widest} inputs "
            "of the widest layer, so that its Gram is singular: damping fills the rest. Give more "
            "text, or raise calibration_windows.",
            stacklevel=2,
        )


def _longest(tokenizer: Any, model_config: Any) -> int:
    """Most tokens that both the tokenizer and the model take."""
    limits = [
        getattr(tokenizer, "model_max_length", None),
        getattr(text_config(model_config), "max_position_embeddings", None),
    ]
    return min(limit for limit in (*limits, 1 << 30) if isinstance(limit, int) and limit > 0)
