"""One sitting of a run: load, tell, train, answer, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from loftq import api
from loftq.train.arguments import DTYPES
from loftq.train.base import Base
from loftq.train.closing import write_adapter
from loftq.train.errors import TrainError
from loftq.train.forecast import Forecast, forecast
from loftq.train.inputs import Inputs, longest_row
from loftq.train.pace import epoch_seconds
from loftq.train.packing import keeps_apart
from loftq.train.peak import PeakMeter
from loftq.train.samples import answer
from loftq.train.sitting import Sitting

TRAINERS = {"sft": "loftq.train.sft", "preference": "loftq.train.dpo"}
"""Kind of data -> the module that arranges its rows and builds its trainer."""
METHODS = {
    "sft": "supervised fine-tuning (TRL's SFTTrainer)",
    "preference": "direct preference optimization (TRL's DPOTrainer), because the data holds "
    "preferences; its reference is the adapter that training starts from",
}


PACKED = "short rows are packed together, each attending to itself only"
PADDED = "rows are padded, not packed: this model's attention would let them see each other"


@dataclass(kw_only=True)
class Session(Sitting):
    """What one call of `train` works with."""

    base: Base
    inputs: Inputs
    packing_note: str = ""

    @property
    def kind(self) -> str:
        """sft or preference."""
        return self.inputs.prepared.kind

    def _load(self) -> None:
        self.trainers = import_module(TRAINERS[self.kind])  # before it is measured
        self.meter = PeakMeter(self.place.device)
        self.model = api.load(
            self.base.folder,
            adapter=self.base.adapter,
            trainable=True,
            dtype=DTYPES[self.dtype],
            **self.place.loading(),
            **({"embedding": "host"} if self.config.host_embedding else {}),
        )
        self.packing = self._packing()
        rows = self.trainers.arrange(self.inputs.prepared, packing=self.packing)
        self.train_rows, self.validation_rows = rows
        self.steps = self.config.steps(len(self.train_rows), self.place.processes)

    def _packing(self) -> bool:
        wanted, prepared = self.config.packing, self.inputs.prepared
        text = prepared.kind == "sft" and prepared.counts.format == "text"
        if wanted is False or (wanted is None and not text):
            return False
        if prepared.kind != "sft":
            raise TrainError("packing=true: preferences come in pairs and are not packed.")
        if keeps_apart(self.model, len(self.inputs.tokenizer)):
            self.packing_note = PACKED
            return True
        if wanted:
            raise TrainError(
                "packing=true: this model's attention would let packed rows see each other. Leave "
                "packing out; rows are padded instead."
            )
        self.packing_note = PADDED
        return False

    def _asked(self) -> list[dict[str, Any]]:
        held = self.inputs.prepared.prompts[: self.config.samples]
        return [{"prompt": p.prompt_text, "reference": p.reference} for p in held]

    def _answers(self) -> list[str]:
        return answer(
            self.model,
            self.inputs.tokenizer,
            [p.prompt_ids for p in self.inputs.prepared.prompts[: self.config.samples]],
            tokens=self.config.sample_tokens,
            stop=self.inputs.stop,
        )

    def _build(self) -> Any:
        callbacks = self._callbacks()
        return self.trainers.build(
            model=self.model,
            tokenizer=self.inputs.tokenizer,
            train=self.train_rows,
            validation=self.validation_rows,
            arguments=self._arguments(),
            packing=self.packing,
            max_length=self.inputs.prepared.counts.max_length,
            beta=self.config.beta,
            graphs=self.config.graphs,
            callbacks=callbacks,
        )

    def _brief(self) -> None:
        notes = [METHODS[self.kind], self.place.note(), self.packing_note]
        self._tell(self.base, self.inputs.prepared, notes, epoch_seconds=self._guess())

    @cached_property
    def forecast(self) -> Forecast:
        """Memory of the largest batch."""
        return forecast(
            self.base.folder,
            self.config,
            kind=self.kind,
            longest=longest_row(self.inputs),
            packing=self.packing,
            dtype=self.dtype,
            device=self.place.device.type,
        )

    def _guess(self) -> float | None:
        if self.kind != "sft":
            return None
        return epoch_seconds(
            self.model,
            self.inputs.prepared.train[0]["input_ids"],
            tokens=self.inputs.prepared.counts.tokens // self.place.processes,
            checkpointing=self.config.checkpointing,
        )

    def _scored(self) -> Mapping[str, Any]:
        return {}

    def _save(self) -> None:
        write_adapter(self.run, self.model, self.inputs.tokenizer, self.base.backbone)
