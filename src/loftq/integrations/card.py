"""Model cards: README.md with the hub's front matter, of an output and of a trained adapter.

What the card says of the base (licence, language, task) is copied from the base's own card. A base
that is a folder of the user's is not named: the hub takes `base_model` for an id and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loftq import __version__
from loftq.formats import parse_format
from loftq.integrations.metrics import Metrics, loss_unit, read_metrics
from loftq.integrations.run_folder import RunFolder
from loftq.pipeline.config import QuantizeConfig

CARD = "README.md"
HUB_FILE = "hub.json"
"""Beside an output: the repository that it was pushed to."""
MAX_CARD_BYTES = 2**16
PAPER = "https://arxiv.org/abs/2310.08659"
COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card takes over from its base's."""
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TASKS = (
    (r"(ForCausalLM|LMHeadModel)$", "text-generation"),
    (r"ForMaskedLM$", "fill-mask"),
    (r"ForSequenceClassification$", "text-classification"),
    (r"ForTokenClassification$", "token-classification"),
    (r"ForQuestionAnswering$", "question-answering"),
    (r"ForImageClassification$", "image-classification"),
    (r"ForSpeechSeq2Seq$", "automatic-speech-recognition"),
)
"""End of a transformers class name -> the hub's name of its task."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The base of a card."""

    hub_id: str | None = None
    """None for a folder that is not a hub repository's."""
    copied: Mapping[str, Any] = field(default_factory=dict)
    """Front matter taken over from its card: licence, language, pipeline_tag."""


def origin_of(name: str, folder: Path) -> Origin:
    """What is known of the model in `folder`, named `name` by the user."""
    copied = copied_from(folder)
    task = _pipeline_tag(folder)
    if task is not None:
        copied.setdefault("pipeline_tag", task)
    hub_id = hub_id_of(name, folder)
    link = copied.get("license_link")
    if hub_id is not None and isinstance(link, str) and "/" not in link:
        copied["license_link"] = f"{_hub()}/{hub_id}/blob/main/{link}"  # a file of the base's
    return Origin(hub_id=hub_id, copied=copied)


def hub_id_of(name: str, folder: Path) -> str | None:
    """Hub id of a model, told from the user's name for it or its place in the hub cache."""
    if not Path(name).expanduser().is_dir() and _HUB_ID.fullmatch(name):
        return name
    return cached_id(folder)


def cached_id(folder: Path) -> str | None:
    """Hub id of a folder in the hub cache."""
    found = [m for part in folder.absolute().parts if (m := _CACHED.fullmatch(part))]
    return f"{found[-1][1]}/{found[-1][2]}" if found else None


def copied_from(folder: Path) -> dict[str, Any]:
    """What a card takes over from the card in `folder`."""
    front = read_front_matter(folder / CARD)
    return {key: front[key] for key in COPIED if _usable(front.get(key))}


def read_front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a card; {} where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_CARD_BYTES)
        found = re.match(r"---[ \t]*\n(.*?)\n---", text, re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def output_card(
    record: Mapping[str, Any], origin: Origin, *, name: str, load_name: str | None = None
) -> str:
    """README.md of an output of `quantize`.

    Args:
        record: loftq.json.
        origin: the model it was made from.
        name: title of the card.
        load_name: what a reader gives to `loftq.load`; None = the name.
    """
    config = QuantizeConfig.from_dict(record["config"])
    sums, formats = record["totals"], sorted({layer["format"] for layer in record["layers"]})
    model = origin.hub_id or _last(str(record["source"]["name"]))
    need = (
        "The backbone was chosen together with the adapter and needs it: alone it is worse than "
        "plain rounding."
        if config.resolved_method().adapter_required
        else "The backbone is the plainly rounded weight; any adapter may be trained on it."
    )
    sizes = (
        f"{sums['packed_bytes']:,} packed + {sums['unquantized_bytes']:,} unquantized + "
        f"{sums['adapter_bytes']:,} adapter; source {sums['source_bytes']:,}"
    )
    error = (
        f"{sums['mean_plain_error']:.4f} rounded, {sums['mean_error']:.4f} with the adapter "
        "(mean over layers)"
    )
    rows = {
        "method": f"{config.method}, rank {config.rank}, alpha {config.alpha or config.rank:g}",
        "bits per quantized weight": f"{sums['bits_per_weight']:.3f} (scales included)",
        "bytes": sizes,
        "relative weight error": error,
    }
    front = _front(
        origin, relation="quantized", library="loftq",
        tags=["loftq", *_bits(formats), "lora"],
    )  # fmt: skip
    code = [
        "import loftq  # pip install loftq; registers the format with transformers",
        "",
        f"model = loftq.load({json.dumps(load_name or name)}, trainable=True)  # a PEFT model",
    ]
    about = (
        f"{_text(model)} quantized with [loftq]({PAPER}) {record['loftq']}: a packed "
        f"{', '.join(formats[:4])} backbone\nand the LoRA start that belongs to it "
        "(`init_adapter/`)."
    )
    return _card(front, name, code, about, rows) + f"\n{need}\n"


def adapter_card(
    run: RunFolder, origin: Origin, *, name: str, base: str, load_name: str | None = None
) -> str:
    """README.md of the adapter of a run.

    Args:
        run: folder of `loftq train`.
        origin: the backbone as the hub knows it; its hub_id is the card's base_model.
        name: title of the card.
        base: what a reader gives to `loftq.load` for the backbone: folder or hub id.
        load_name: hub id of the adapter; None = its folder.
    """
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else Metrics()
    front = _front(origin, relation="adapter", library="peft", tags=["loftq", "lora", "peft"])
    where = json.dumps(load_name or str(run.adapter))
    if load_name:
        where = f"snapshot_download({where})"
    code = [
        "import loftq  # pip install loftq; registers the packed format with transformers",
        *(["from huggingface_hub import snapshot_download"] if load_name else []),
        "",
        f"model = loftq.load({json.dumps(base)}, adapter={where})",
    ]
    task = _json(run.task).get("task")
    if task is not None:  # the class of the task and its head, which the backbone's config lacks
        code[0] = "from loftq.tasks import load_task_model  # pip install loftq"
        named = f"{json.dumps(base)}, {json.dumps(task)}"
        code[-1] = f"model, tokenizer = load_task_model({named}, adapter={where})"
    lineage = run.base().backbone
    about = (
        f"A LoRA adapter trained with [loftq]({PAPER}) {__version__} on the packed backbone "
        f"{_code(base)}\n(sha256 `{lineage[:16]}...`). It belongs to that backbone alone: on "
        "another one, the original\nmodel included, its correction is noise. "
        "`loftq export --to lora` makes an adapter for the original."
    )
    return _card(front, name, code, about, _results(run, metrics))


def write_adapter_card(run: RunFolder) -> Path:
    """Write RUN/adapter/README.md from what the run holds; returns its path."""
    folder = run.base().path
    origin = Origin(hub_id=backbone_repo(folder), copied=copied_from(folder))
    name = run.path.resolve().name
    path = run.adapter / CARD
    path.write_text(adapter_card(run, origin, name=name, base=str(folder)), encoding="utf-8")
    return path


def backbone_repo(folder: Path) -> str | None:
    """Hub id of an output of `quantize`: where it was pushed to, or downloaded from."""
    note, record = _json(folder / HUB_FILE), _json(folder / "loftq.json")
    same = note.get("backbone") == record.get("backbone")  # not overwritten since
    return note["repo"] if same and isinstance(note.get("repo"), str) else cached_id(folder)


def _results(run: RunFolder, metrics: Metrics) -> dict[str, str]:
    data = _json(run.data)
    rows, best, unit = _scores(_json(run.task)), metrics.best, loss_unit(data)
    if best is not None:
        first = metrics.validation[0]
        was = f"; {first['validation_loss']:.4f} at step {first['step']:g}"
        rows[f"best validation loss, {unit}"] = (
            f"{best['validation_loss']:.4f} at step {best['step']:g}{'' if first is best else was}"
        )
    if metrics.train:
        last = metrics.train[-1]
        rows[f"training loss, {unit}"] = f"{last['loss']:.4f} at step {last['step']:g}"
    for key, words in (
        ("rows", "examples"),
        ("tokens", "tokens"),
        ("trained_tokens", "tokens with a loss"),
        ("max_length", "longest sample, tokens"),
    ):
        if isinstance(data.get(key), int):
            rows[words] = f"{data[key]:,}"
    return rows


def _scores(task: Mapping[str, Any]) -> dict[str, str]:
    """Lines of a published task: each metric on each reported split."""
    return {
        f"{task['task']} {split}, {name}": (
            f"{score['value']:.4f} (95 % interval {score['low']:.4f} to {score['high']:.4f}, "
            f"{score['rows']:,} rows)"
        )
        for split, scores in (task.get("metrics") or {}).items()
        for name, score in scores.items()
    }


def _front(origin: Origin, *, relation: str, library: str, tags: list[str]) -> str:
    values: dict[str, Any] = {}
    if origin.hub_id is not None:
        values |= {"base_model": origin.hub_id, "base_model_relation": relation}
    values["library_name"] = library
    values |= {key: origin.copied[key] for key in COPIED if key in origin.copied}
    values["tags"] = tags
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _pipeline_tag(folder: Path) -> str | None:
    names = _json(folder / "config.json").get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return next((task for end, task in _TASKS if re.search(end, name)), None)


def _bits(formats: list[str]) -> list[str]:
    return [f"{bits}-bit" for bits in sorted({parse_format(name).bits for name in formats})]


def _usable(value: object) -> bool:
    return bool(value) and (
        isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    )


def _card(front: str, name: str, code: list[str], about: str, rows: Mapping[str, str]) -> str:
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    parts = [front, f"# {_text(name)}", "", "```python", *code, "```", "", about, ""]
    return "\n".join([*parts, "| | |", "|---|---|", *table, ""])


def _text(text: str) -> str:
    """A name of the user's as Markdown that says just that."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _last(name: str) -> str:
    return Path(name).name or name


def _hub() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
