"""What is written and told while the trainer runs, and when it has to stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loftq.train.errors import Diverged
from loftq.train.keep import keep_blocks
from loftq.train.listener import Listener, Pace
from loftq.train.peak import PeakMeter

EXTRA = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy"}
"""Figures of preference training that a row carries too."""


class Recorder(TrainerCallback):
    """Rows of metrics.jsonl: one per step, one per validation.

    Args:
        path: metrics.jsonl; None in processes that do not write.
        listener: told of each row.
        meter: of memory.
        capacity: bytes of memory that the device has.
        seconds: trained by earlier sessions of this run.
        scores: metrics that a row of a validation carries beside its loss.
    """

    def __init__(
        self,
        path: Path | None,
        listener: Listener,
        meter: PeakMeter,
        *,
        capacity: int | None,
        seconds: float = 0.0,
        scores: Sequence[str] = (),
    ) -> None:
        self._path, self._listener, self._meter = path, listener, meter
        self._capacity, self._before, self._scores = capacity, seconds, scores
        self._began = self._step_began = time.perf_counter()
        self._in_steps, self._first_step, self._tokens, self._seen = 0.0, 0, 0.0, 0.0
        self._batches = 0

    @property
    def seconds(self) -> float:
        """Trained so far, by all sessions of the run."""
        return self._before + time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._first_step = time.perf_counter(), state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._in_steps += time.perf_counter() - self._step_began

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        _refuse_divergence(args, state, logs)
        self._tokens, tokens = _tokens_seen(logs), self._tokens
        rate = (self._tokens - tokens) / self._in_steps if self._in_steps > 0 else None
        self._in_steps = 0.0
        peak = self._meter.peak
        row = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 4),
            "loss": float(logs["loss"]),
            "learning_rate": float(logs.get("learning_rate", 0)),
            "grad_norm": float(logs.get("grad_norm", 0)),
            "tokens_per_second": None if rate is None else round(rate, 1),
            "seconds": round(self.seconds, 3),
            "peak_gb": None if peak is None else round(peak / 1e9, 4),
        }
        row |= {name: float(logs[key]) for key, name in EXTRA.items() if key in logs}
        self._write(row)
        self._listener.step(row, self._pace(state))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        self._batches += 1
        self._listener.reading("batches", self._batches, len(eval_dataloader))
        self._batches %= len(eval_dataloader)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is None:
            return
        epoch = round(float(state.epoch or 0), 4)
        row = {"step": state.global_step, "epoch": epoch, "validation_loss": float(loss)}
        found = metrics or {}
        row |= {n: float(found[f"eval_{n}"]) for n in self._scores if f"eval_{n}" in found}
        self._write(row)
        self._listener.validation(row, self._pace(state))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The last row."""
        self._write({"summary": dict(summary)})

    def _pace(self, state: Any) -> Pace:
        done = state.global_step - self._first_step
        each = (time.perf_counter() - self._began) / done if done else None
        left = None if each is None else each * (state.max_steps - state.global_step)
        in_epoch = state.global_step / state.epoch if state.epoch else None
        whole = each * in_epoch if each and in_epoch and done > 1 else None
        return Pace(
            step=state.global_step,
            total=state.max_steps,
            seconds_left=left,
            epoch_seconds=whole,
            capacity=self._capacity,
        )

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class LastStep(TrainerCallback):
    """Validate and save after the last step, whatever it is divisible by."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = True
        return control


def _tokens_seen(logs: Mapping[str, Any]) -> float:
    """Tokens since the first step, in the words of TRL or of transformers' own trainer."""
    return float(logs.get("num_tokens", logs.get("num_input_tokens_seen", 0)))


def _refuse_divergence(args: Any, state: Any, logs: Mapping[str, Any]) -> None:
    loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0))
    if math.isfinite(loss) and (math.isfinite(norm) or args.fp16):  # fp16 skips such a step itself
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    advice = [f"a lower learning_rate (it was {args.learning_rate:g})"]
    if args.fp16:
        advice.append("dtype=bf16 or fp32")
    advice += ["a smaller max_grad_norm", "more warmup"]
    raise Diverged(
        f"step {state.global_step}: {what}. Training stopped; the checkpoints in "
        f"{args.output_dir} are from before. Try {', '.join(advice)} in another folder or with "
        "--overwrite; if it happens at the same step again, look for a broken row in the data."
    )


class KeptBlocks(TrainerCallback):
    """Leaves the last blocks out when a trainer has switched checkpointing on.

    Args:
        blocks: how many.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep_blocks(kwargs["model"], self.blocks)
