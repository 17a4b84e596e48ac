"""The end of a run: what it came to, and the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loftq.integrations.card import write_adapter_card
from loftq.integrations.metrics import read_metrics
from loftq.integrations.peft import write_lineage
from loftq.integrations.run_folder import RunFolder


def summarize(run: RunFolder, state: Any, *, planned: int) -> dict[str, Any]:
    """Steps and losses for the last row of metrics.jsonl.

    Args:
        run: its metrics.jsonl holds all other rows.
        state: of the trainer, at its end.
        planned: steps that the run was to have.
    """
    found, steps = read_metrics(run.metrics), state.global_step
    # Of the steps that were saved: a better one in between left no adapter behind.
    saved = state.best_model_checkpoint
    chosen = int(Path(saved).name.rpartition("-")[2]) if saved else steps
    losses = {row["step"]: row["validation_loss"] for row in found.validation}
    return {
        "steps": steps,
        "epochs": round(float(state.epoch or 0), 4),
        "final_loss": found.train[-1]["loss"] if found.train else None,
        "first_validation_loss": losses.get(0),
        "best_validation_loss": losses.get(chosen),
        "best_step": chosen,
        "stopped_early": steps < planned,
    }


def write_adapter(run: RunFolder, model: Any, tokenizer: Any, backbone: str) -> None:
    """RUN/adapter: weights, lineage, tokenizer, card; it appears when it is whole."""
    partial = run.adapter.with_name("adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), selected_adapters=["default"])
    write_lineage(partial, backbone)
    tokenizer.save_pretrained(str(partial))
    partial.rename(run.adapter)
    write_adapter_card(run)
