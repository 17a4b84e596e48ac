"""One sitting of a run: load, tell, train, answer, write."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from loftq import api
from loftq.integrations.card import write_adapter_card
from loftq.integrations.metrics import read_metrics
from loftq.integrations.peft import write_lineage
from loftq.integrations.run_folder import RunFolder
from loftq.train import resume
from loftq.train.arguments import DTYPES, common_arguments, resolve_dtype
from loftq.train.base import Base
from loftq.train.config import OPTIMIZERS, Steps, TrainConfig
from loftq.train.data import Prepared, prepare
from loftq.train.errors import TrainError
from loftq.train.exhausted import explain_memory
from loftq.train.listener import Briefing, Listener
from loftq.train.options import Chosen
from loftq.train.pace import epoch_seconds
from loftq.train.packing import keeps_apart
from loftq.train.peak import PeakMeter, capacity
from loftq.train.place import Place
from loftq.train.result import TrainResult, read_result
from loftq.train.samples import answer, stop_tokens

TRAINERS = {"sft": "loftq.train.sft", "preference": "loftq.train.dpo"}
"""Kind of data -> the module whose `build` makes the trainer."""
METHODS = {
    "sft": "supervised fine-tuning (TRL's SFTTrainer)",
    "preference": "direct preference optimization (TRL's DPOTrainer), because the data holds "
    "preferences; its reference is the adapter that training starts from",
}
WATCHED_ROWS = 200  # rows in which the mark that ends an answer is looked for


@dataclass(kw_only=True)
class Session:
    """What one call of `train` works with."""

    run: RunFolder
    base: Base
    chosen: Chosen
    settings: Mapping[str, Any]
    """config.yaml."""
    place: Place
    listener: Listener
    checkpoint: resume.Checkpoint | None
    """Where to go on from."""

    def carry_out(self, data: str, validation: str | None) -> TrainResult:
        """Train, and write everything that a finished run holds."""
        self._prepare(data, validation)
        self._write_start()
        self._load()
        before = self._answers_before()
        trainer = self._build()
        self._brief()
        self._train(trainer)
        self._finish(trainer, before)
        self.place.wait()
        return read_result(self.run, resumed=self.checkpoint.step if self.checkpoint else 0)

    def _prepare(self, data: str, validation: str | None) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.base.folder)
        model_config = AutoConfig.from_pretrained(self.base.folder).get_text_config()
        if not self.place.is_main:
            self.place.wait()  # the main process fills the caches
        self.prepared: Prepared = prepare(
            data,
            self.tokenizer,
            self.chosen.data,
            validation=validation,
            model_context=getattr(model_config, "max_position_embeddings", None),
        )
        if self.place.is_main:
            self.place.wait()
        self.config: TrainConfig = self.chosen.config.for_kind(self.prepared.kind)
        self.counts: dict[str, Any] = self.prepared.counts.to_dict()
        self.steps: Steps = self.config.steps(len(self.prepared.train), self.place.processes)

    def _write_start(self) -> None:
        """The records that say what this is, before anything takes time."""
        digest = _digest(self.prepared)
        if self.checkpoint is not None:
            self._refuse_other_input(digest)
        if not self.place.is_main:
            return
        resume.write_record(self.run.config, self.settings)
        resume.write_record(self.run.path / "base.json", self.base.record())
        resume.write_record(self.run.data, {**self.counts, "digest": digest})

    def _refuse_other_input(self, digest: str) -> None:
        import json

        then = json.loads(self.run.data.read_text(encoding="utf-8")).get("digest")
        if then != digest:
            raise TrainError(
                f"{self.run.path}: holds an unfinished run on other data: the file has changed, or "
                "it is tokenized differently. Restore the data, or start anew with --overwrite."
            )
        backbone = self.run.base().backbone
        if backbone != self.base.backbone:
            raise TrainError(
                f"{self.run.path}: holds an unfinished run on backbone {backbone[:12]}, this one "
                f"is {self.base.backbone[:12]}. Give the same model, or use --overwrite."
            )

    def _load(self) -> None:
        device = self.place.device
        self.meter = PeakMeter(device)
        self.dtype = resolve_dtype(self.config.dtype, device)
        self.model = api.load(
            self.base.folder,
            adapter=self.base.adapter,
            trainable=True,
            dtype=DTYPES[self.dtype],
            **self.place.loading(),
        )
        self.packing = self._packing()

    @cached_property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _packing(self) -> bool:
        wanted = self.config.packing
        text = self.prepared.kind == "sft" and self.counts["format"] == "text"
        if wanted is False or (wanted is None and not text):
            return False
        if self.prepared.kind != "sft":
            raise TrainError("packing=true: preferences come in pairs and are not packed.")
        if keeps_apart(self.model, len(self.tokenizer)):
            return True
        if wanted:
            raise TrainError(
                "packing=true: this model's attention would let packed rows see each other. Leave "
                "packing out; rows are padded instead."
            )
        return False

    def _answers_before(self) -> list[dict[str, Any]]:
        """samples.json without the answers to come; those of an earlier sitting are kept."""
        held = self.prepared.prompts[: self.config.samples]
        rows = [{"prompt": p.prompt_text, "reference": p.reference} for p in held]
        kept = _read_samples(self.run)
        if [{k: row.get(k) for k in ("prompt", "reference")} for row in kept] == rows:
            return kept
        texts = self._answer()
        found = [row | {"before": text, "after": None} for row, text in zip(rows, texts, strict=True)]
        if self.place.is_main:
            resume.write_record(self.run.samples, found)
        return found

    def _answer(self) -> list[str]:
        if not self.place.is_main:
            return [""] * len(self.prepared.prompts[: self.config.samples])
        return answer(
            self.model,
            self.tokenizer,
            [p.prompt_ids for p in self.prepared.prompts[: self.config.samples]],
            tokens=self.config.sample_tokens,
            stop=self.stop,
        )

    @cached_property
    def stop(self) -> list[int]:
        """Ids that end an answer."""
        rows = self.prepared.train
        if self.prepared.kind != "sft":
            return stop_tokens(self.tokenizer, [])
        first = rows.select(range(min(WATCHED_ROWS, len(rows))))
        return stop_tokens(self.tokenizer, map(_trained_part, first))

    def _build(self) -> Any:
        step = self.checkpoint.step if self.checkpoint else 0
        self.capacity = capacity(self.place.device)
        trainable = self.trainable
        if self.place.is_main:
            state = 2 if "8bit" in self.config.optimizer else 8
            resume.check_space(self.run, trainable, state, self.config.keep_checkpoints)
        from transformers import PrinterCallback

        from loftq.train.callbacks import LastStep, Recorder

        validate = self.prepared.validation is not None and len(self.prepared.validation) > 0
        seconds = resume.rewind_metrics(self.run, step) if self.place.is_main else 0.0
        self.recorder = Recorder(
            self.run.metrics if self.place.is_main else None,
            self.listener,
            self.meter,
            capacity=self.capacity,
            seconds=seconds,
        )
        callbacks: list[Any] = [self.recorder, LastStep(validate)]
        if self.config.early_stop is not None:
            from transformers import EarlyStoppingCallback

            callbacks.append(EarlyStoppingCallback(self.config.early_stop))
        with _no_bars():
            trainer = import_module(TRAINERS[self.prepared.kind]).build(
                model=self.model,
                tokenizer=self.tokenizer,
                train=self.prepared.train,
                validation=self.prepared.validation if validate else None,
                arguments=common_arguments(
                    self.config,
                    self.steps,
                    checkpoints=self.run.checkpoints,
                    dtype=self.dtype,
                    device=self.place.device,
                    validate=validate,
                ),
                packing=self.packing,
                max_length=self.counts["max_length"],
                beta=self.config.beta,
                callbacks=callbacks,
            )
        trainer.remove_callback(PrinterCallback)  # the listener speaks
        return trainer

    def _brief(self) -> None:
        if not self.place.is_main:
            return
        notes = [METHODS[self.prepared.kind], self.place.note()]
        if self.packing:
            notes.append("short rows are packed together, each attending to itself only")
        self.listener.ready(
            Briefing(
                base=self.base,
                config=self.config,
                prepared=self.prepared,
                steps=self.steps,
                device=str(self.place.device),
                dtype=self.dtype,
                trainable=self.trainable,
                memory={},
                capacity=self.capacity,
                epoch_seconds=self._guess(),
                resumed=self.checkpoint.step if self.checkpoint else 0,
                notes=tuple(note for note in notes if note),
            )
        )

    def _guess(self) -> float | None:
        if self.prepared.kind != "sft":
            return None
        tokens = self.counts["tokens"] / self.place.processes
        return epoch_seconds(
            self.model,
            self.prepared.train[0]["input_ids"],
            tokens=int(tokens),
            checkpointing=self.config.checkpointing,
        )

    def _train(self, trainer: Any) -> None:
        start = str(self.checkpoint.path) if self.checkpoint else None
        self.meter.start()
        try:
            trainer.train(resume_from_checkpoint=start)
        except torch.OutOfMemoryError as error:
            raise explain_memory(error, trainer, self) from error
        finally:
            self.meter.stop()

    def _finish(self, trainer: Any, samples: list[dict[str, Any]]) -> None:
        """Answers, records, and the adapter last: with it the run counts as finished."""
        if not self.place.is_main:
            return
        for row, text in zip(samples, self._answer(), strict=True):
            row["after"] = text
        resume.write_record(self.run.samples, samples)
        peak = self.meter.peak
        resume.write_record(self.run.memory, {"predicted": {}, "measured_peak": peak})
        self.recorder.write_summary(self._summary(trainer))
        self._save_adapter()
        write_adapter_card(self.run)
        self.listener.finished(samples)

    def _summary(self, trainer: Any) -> dict[str, Any]:
        found = read_metrics(self.run.metrics)
        best, steps = found.best, trainer.state.global_step
        return {
            "steps": steps,
            "epochs": round(float(trainer.state.epoch or 0), 4),
            "final_loss": found.train[-1]["loss"] if found.train else None,
            "first_validation_loss": found.validation[0]["validation_loss"]
            if found.validation
            else None,
            "best_validation_loss": best and best["validation_loss"],
            "best_step": best["step"] if best else steps,
            "stopped_early": steps < self.steps.total,
            "seconds": round(self.recorder.seconds, 3),
            "method": self.prepared.kind,
            "dtype": self.dtype,
            "device": str(self.place.device),
        }

    def _save_adapter(self) -> None:
        partial = self.run.adapter.with_name("adapter.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(str(partial), selected_adapters=["default"])
        write_lineage(partial, self.base.backbone)
        self.tokenizer.save_pretrained(str(partial))
        partial.rename(self.run.adapter)


def _trained_part(row: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The tokens of a row up to the last one that is learnt."""
    mask = row["completion_mask"]
    end = len(mask) - next((i for i, learnt in enumerate(reversed(mask)) if learnt), len(mask))
    return row["input_ids"][:end]


def _digest(prepared: Prepared) -> str:
    """sha256 of all rows, of training and validation, in their order."""
    found = hashlib.sha256()
    for rows in (prepared.train, prepared.validation):
        for batch in rows.iter(1000):
            found.update(repr(sorted(batch.items())).encode())
    return found.hexdigest()


def _read_samples(run: RunFolder) -> list[dict[str, Any]]:
    import json

    try:
        found = json.loads(run.samples.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in found if isinstance(row, dict) and isinstance(row.get("before"), str)]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The rows are few or the wait is short: no bars of `datasets` on the terminal."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
