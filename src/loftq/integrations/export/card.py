"""README.md of an export: what it is, how to serve it, what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from loftq import __version__
from loftq.integrations.card import CARD, COPIED, PAPER, read_front_matter
from loftq.integrations.export.job import Job
from loftq.integrations.export.serve import Serve


def export_card(
    job: Job, target: str, summary: str, places: tuple[Serve, ...], limits: tuple[str, ...]
) -> str:
    """The model card, with the hub's front matter as far as the packed model's card has it."""
    source = job.source
    formats = ", ".join(sorted({str(weight.spec) for weight in source.weights}))
    kind, rank = "trained" if source.trained else "start", source.adapter.highest_rank
    about = (
        f"{Path(source.model).name} quantized with [loftq]({PAPER}) {__version__} ({formats}) and\n"
        f"exported as {target}: {summary}.\nThe {kind} adapter has rank {rank}."
    )
    lines = [
        f"---\n{_front(job, target)}---\n# {job.output.name}\n\n{about}\n",
        *(line for place in places for line in _block(place)),
        "Limits:\n",
        *(f"- {limit}" for limit in limits),
    ]
    return "\n".join(lines) + "\n"


def _front(job: Job, target: str) -> str:
    card = read_front_matter(job.source.folder / CARD)
    values: dict[str, Any] = {}
    if card.get("base_model"):
        relation = {"lora": "adapter", "dense": "finetune"}.get(target, "quantized")
        values = {"base_model": card["base_model"], "base_model_relation": relation}
    if target == "lora":
        values["library_name"] = "peft"
    values |= {key: card[key] for key in COPIED if key in card}
    values["tags"] = ["loftq", target]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _block(place: Serve) -> list[str]:
    language = "python" if place.engine == "transformers" else "bash"
    code = place.command.replace("; ", "\n") if language == "python" else place.command
    return [f"With {place.engine}:", "", f"```{language}", code, "```", ""]
