"""`loftq train`: from a model and a data file to a folder with the trained adapter.

One function; the loop itself is TRL's. The folder of a run is complete at every moment: records
appear whole, the adapter comes last, and whatever interrupts a run, the same call goes on with it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from loftq.integrations.run_folder import RunFolder
from loftq.train import resume
from loftq.train.arguments import resolve_dtype
from loftq.train.base import (
    Base,
    backbone_folder,
    locate,
    own_tokenizer,
    require_calibration,
    settle,
)
from loftq.train.budget import fit_to
from loftq.train.config import TrainConfig, missing_packages
from loftq.train.errors import TrainError
from loftq.train.folder import begin, claimed, refuse_differences, refuse_others, refuse_own_output
from loftq.train.inputs import Inputs, read_inputs
from loftq.train.listener import Listener
from loftq.train.options import split_options
from loftq.train.place import Place
from loftq.train.result import TrainResult, read_result
from loftq.train.session import Session

EXTRA = {"trl": "loftq[train]", "datasets": "loftq[train]"}


def train(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    validation: str | Path | None = None,
    device: str | None = None,
    cache: str | Path | None = None,
    memory: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> TrainResult:
    """Fine-tune the adapter of a packed model on your own data.

    Chats, prompt/completion pairs and plain text are learnt by supervised fine-tuning, pairs of a
    better and a worse answer by direct preference optimization against the adapter that training
    starts from. Called again after an interruption it goes on from the last checkpoint and ends in
    the same adapter (on a CPU to the last bits of the loss).

    Args:
        model: output of `loftq.quantize`, run of `loftq.train` (goes on from its adapter), or a
            full-precision model, which is quantized first and kept in `cache`.
        data: file, folder or hub id; see docs/data.md for the formats.
        output: folder of the run (integrations/run_folder.py).
        validation: held-out data; None = a share of `data` (option `holdout`).
        device: "cpu" or "cuda"; None = the GPU if there is one. Under torchrun or accelerate each
            process takes one device.
        cache: folder for backbones that are made here; None = loftq/packed in the user's cache.
        memory: size of the card, such as "8GB": what `options` leave open of bits, rank, context,
            batch, checkpointing, embedding and head is chosen so that training fits.
        overwrite: replace what an earlier run left in `output`.
        listener: told how the run goes.
        **options: fields of `TrainConfig` (learning_rate, epochs, ...), of `DataSettings`
            (max_length, holdout, ...) and of `QuantizeConfig` (bits, rank, ..., for a
            full-precision model; its text to calibrate on is `calibration` here).

    Returns:
        TrainResult: losses, steps, samples, memory, and where the adapter is.

    Raises:
        TrainError: settings that cannot be carried out, a method that calibrates without
            `calibration`, other settings than those of an unfinished run in `output`, a
            loss that is not a number, memory that is not enough.
        DataError: rows that cannot be used.
        ValueError: anything wrong with the model or an option.
    """
    chosen = split_options(options)
    _require(chosen.config)
    place, run = Place(device), RunFolder(Path(output))
    names = str(model), str(data), None if validation is None else str(validation)
    told = (listener or Listener()) if place.is_main else Listener()
    refuse_own_output(names[0], run)
    folder, tokenizer = backbone_folder(names[0]), own_tokenizer(names[0])
    if not (folder / "loftq.json").is_file():  # or else `locate` says that it is packed already
        require_calibration(chosen.quantize)
    if memory is not None:
        rows = read_inputs(folder, names[1], names[2], chosen.data, place, tokenizer=tokenizer)
        chosen, fit = fit_to(
            memory,
            folder,
            chosen,
            rows,
            device=place.device.type,
            dtype=resolve_dtype(chosen.config.dtype, place.device),
            given=set(options),
        )
        told.fitted(fit)
    settings = {**chosen.settings(*names), "memory": memory}
    with claimed(run, place):
        if resume.is_finished(run) and not overwrite:
            refuse_differences(run, resume.differences(run, settings), finished=True)
            return read_result(run, already_finished=True)
        # The rows before the weights: quantizing takes long, and a bad row is soon found.
        inputs = read_inputs(folder, names[1], names[2], chosen.data, place, tokenizer=tokenizer)
        quantize = dict(chosen.quantize) | ({} if device is None else {"device": device})
        found = locate(names[0], quantize, cache=None if cache is None else Path(cache))
        # What may be refused was: an earlier run is cleared away only now.
        checkpoint = begin(run, place, settings, overwrite=overwrite)
        with place.main_first():
            base = settle(found, quantize, told)
        _record(run, place, settings, base, inputs, resumed=checkpoint is not None)
        session = Session(
            run=run,
            base=base,
            inputs=inputs,
            config=chosen.config.for_kind(inputs.prepared.kind),
            place=place,
            listener=told,
            checkpoint=checkpoint,
        )
        session.carry_out()
        return read_result(run, resumed=session.first_step)


def _record(
    run: RunFolder,
    place: Place,
    settings: dict[str, Any],
    base: Base,
    inputs: Inputs,
    *,
    resumed: bool,
) -> None:
    """The records that say what this is, before anything takes time."""
    if resumed:
        refuse_others(run, digest=inputs.digest, backbone=base.backbone)
    if place.is_main:
        resume.write_record(run.config, settings)
        resume.write_record(run.path / "base.json", base.record())
        counts = {**inputs.prepared.counts.to_dict(), "digest": inputs.digest}
        resume.write_record(run.data, counts)


def _require(config: TrainConfig) -> None:
    for name, extra in EXTRA.items():
        if importlib.util.find_spec(name) is None:
            raise TrainError(f"training needs {name}: pip install '{extra}'.")
    missing = missing_packages(config, importlib.util.find_spec)
    if missing:
        raise TrainError(
            f"optimizer={config.optimizer}, report_to={config.report_to}: needs "
            f"{' and '.join(missing)}. pip install {' '.join(missing)}, or choose another."
        )
