"""Settings that fit a card: `memory=8GB`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.train.forecast import SIDES
from loftq.train.inputs import Inputs, longest_row
from loftq.train.options import Chosen

if TYPE_CHECKING:
    from loftq.train.memory.fit import Fit
    from loftq.train.memory.subject import Subject

TABLES = ("embedding", "head")


def fit_to(
    memory: str,
    folder: Path,
    chosen: Chosen,
    inputs: Inputs | None,
    *,
    device: str,
    dtype: str,
    given: set[str],
) -> tuple[Chosen, Fit]:
    """Options with what was left open chosen so that the run fits `memory`.

    What the user gave stays. Of a model that is packed already bits, rank and tables are what they
    are; context, batch and checkpointing are chosen.

    Args:
        memory: size of the card, such as 8GB.
        folder: of the packed or the full-precision model.
        chosen: the options.
        inputs: rows at their full length; None = of any length.
        device: "cpu" or "cuda", which need not be here.
        dtype: of the computation: bf16, fp16 or fp32.
        given: names of the options that the user gave.

    Raises:
        NothingFits: with the smallest need.
        ValueError: not a size, or a model that cannot be predicted.
    """
    from loftq.train.memory.budget import parse_size
    from loftq.train.memory.fit import fit
    from loftq.train.memory.predict import TrainingSettings
    from loftq.train.memory.source import configurable, context_limit
    from loftq.train.memory.subject import subject_of_output

    packed = (folder / "loftq.json").is_file()
    sides = 1 if inputs is None else SIDES[inputs.prepared.kind]
    fixed = _as_asked(chosen, given, sides)
    if packed:
        subject = subject_of_output(folder)
        rank = max(weight.rank for weight in subject.weights)
        fixed = {"bits": None, "rank": rank, "embedding": None, "head": None,
                 "embedding_on_host": False, **fixed}  # fmt: skip

        def configure(**_: Any) -> Subject:
            return subject

    else:
        configure = configurable(folder, dict(chosen.quantize))
        fixed |= {key: chosen.quantize[key] for key in ("bits", "rank", *TABLES) if key in given}
        if given & {"format", "engine"}:
            fixed["bits"] = None
    found = fit(
        configure,
        parse_size(memory),
        longest=None if inputs is None else longest_row(inputs),
        limit=context_limit(folder) if inputs is None else inputs.prepared.counts.max_length,
        fixed=fixed,
        settings=TrainingSettings(
            dtype=dtype,
            optimizer=chosen.config.optimizer,
            fused=chosen.config.fused,
            offload=chosen.config.offload,
            keep_blocks=chosen.config.keep_blocks,
            device=device,
        ),
    )
    return _with(chosen, found, {} if packed else found.options, sides, given), found


def _as_asked(chosen: Chosen, given: set[str], sides: int) -> dict[str, Any]:
    """What the settings of the training leave no choice about, by names of `memory.fit`."""
    fixed: dict[str, Any] = {}
    config = chosen.config
    if "host_embedding" in given:
        fixed["embedding_on_host"] = config.host_embedding
    if "checkpointing" in given or config.keep_blocks or config.offload:
        fixed["checkpointing"] = config.checkpointing
    if "max_length" in given:
        fixed["length"] = chosen.data.max_length
    if "batch_size" in given:
        fixed["batch_size"] = config.batch_size * sides
    elif sides > 1:  # one pair at a time: half of one is none
        fixed["batch_size"] = sides
    return fixed


def _with(
    chosen: Chosen, found: Fit, options: Mapping[str, Any], sides: int, given: set[str]
) -> Chosen:
    step = found.settings
    rows = max(1, step.batch_size // sides)
    fitted: dict[str, Any] = {
        "batch_size": rows,
        "gradient_accumulation": max(1, step.accumulation * step.batch_size // (sides * rows)),
        "checkpointing": step.checkpointing,
        "host_embedding": step.embedding_on_host,
    }
    return replace(
        chosen,
        config=replace(chosen.config, **{k: v for k, v in fitted.items() if k not in given}),
        data=replace(chosen.data, max_length=step.length),
        quantize={**chosen.quantize, **options},
    )
