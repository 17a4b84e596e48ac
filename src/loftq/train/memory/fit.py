"""What to choose so that training fits a budget: quality first, then context, then speed.

The order of preference, from what is given up first to what is given up last:

1. batch size, down to one row, with the accumulation that keeps BATCH rows a step;
2. embedding and head in 8 bits (a fraction of a percent of rounding error), then the embedding on
   the host;
3. bits of the backbone, 4, 3, 2;
4. context, halved down to SHORTEST tokens;
5. rank, halved down to LOWEST_RANK: with fewer bits it is the adapter that makes up for them.

Checkpointing is on from the start, since without it next to nothing fits; it is switched off where
the budget allows it at the longest context. What the caller fixes stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from loftq.train.memory.budget import usable
from loftq.train.memory.predict import PeakMemory, TrainingSettings, fixed_bytes, predict
from loftq.train.memory.speed import Pace, pace
from loftq.train.memory.subject import Subject

BATCH = 8
"""Rows that an optimizer step sees, as batch size x accumulation."""
CONTEXT = 2048
"""Longest context that is chosen when nothing is known of the data."""
SHORTEST, DEFAULT_RANK, LOWEST_RANK = 256, 16, 8
BITS = (4, 3, 2)
TABLES = (
    {"embedding": 16, "head": 16, "embedding_on_host": False},
    {"embedding": 8, "head": 8, "embedding_on_host": False},
    {"embedding": 8, "head": 8, "embedding_on_host": True},
)

Configure = Callable[..., Subject]
"""(bits=, rank=, embedding=, head=) -> the model quantized so."""


class NothingFits(ValueError):
    """No choice fits the budget; the message has the smallest need."""


@dataclass(frozen=True, kw_only=True)
class FitChoice:
    """One thing that was chosen."""

    name: str
    value: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to train within a budget."""

    budget: int
    """Bytes as given."""
    usable: int
    """Bytes of it that tensors may take."""
    settings: TrainingSettings
    options: Mapping[str, Any]
    """Options of `quantize`: bits (or what fixes the format), rank, embedding, head."""
    peak: PeakMemory
    choices: tuple[FitChoice, ...]
    pace: Pace

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "budget": self.budget,
            "usable": self.usable,
            "settings": asdict(self.settings),
            "options": dict(self.options),
            "peak": self.peak.to_dict(),
            "choices": [choice.to_dict() for choice in self.choices],
            "seconds_per_token": self.pace.seconds_per_token,
            "speed_basis": self.pace.basis,
        }


def fit(
    configure: Configure,
    budget: int,
    *,
    longest: int | None = None,
    limit: int | None = None,
    fixed: Mapping[str, Any] | None = None,
    settings: TrainingSettings | None = None,
) -> Fit:
    """The first choice in the order of preference (see above) whose peak fits.

    Args:
        configure: makes the subject of a choice of bits, rank, embedding and head.
        budget: bytes of the card, or for the process.
        longest: tokens of the longest row of the data; None = not known.
        limit: longest context of the model; None = not known.
        fixed: what the user asked for: bits, rank, embedding, head, embedding_on_host, length,
            batch_size, checkpointing.
        settings: dtype, optimizer, loss and device; the rest of it is chosen here.

    Raises:
        NothingFits: with the smallest need and what it is made of.
        UnknownModel: the model cannot be walked through.
        ValueError: a tied embedding is asked to be on the host.
    """
    chosen, fixed = settings or TrainingSettings(), dict(fixed or {})
    room = usable(budget, chosen.device)
    start = min(x for x in (longest or CONTEXT, limit) if x)
    candidates = list(_candidates(configure, chosen, start, fixed))
    options, step = candidates[-1]
    least = predict(_subject(configure, options), step)
    if least.total > room:
        raise NothingFits(_nothing(budget, room, least, _words(options, step)))
    for options, step in candidates:
        subject = _subject(configure, options)
        # The weights alone rule most choices out, without a walk through the model.
        if fixed_bytes(subject, step) > room:
            continue
        peak = predict(subject, step)
        if peak.total > room:
            continue
        if "checkpointing" not in fixed:
            step, peak = _without_checkpointing(subject, step, peak, room=room, start=start)
        return Fit(
            budget=budget,
            usable=room,
            settings=step,
            options={k: v for k, v in options.items() if v is not None},
            peak=peak,
            choices=tuple(_explain(subject, options, step, fixed, start, longest)),
            pace=pace(subject, step),
        )
    raise AssertionError("the last candidate fits")


def _candidates(
    configure: Configure, chosen: TrainingSettings, start: int, fixed: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], TrainingSettings]]:
    """Every choice, in the order of preference."""
    any_of_it = {"bits": fixed.get("bits"), "rank": fixed.get("rank") or DEFAULT_RANK}
    shared = _subject(configure, any_of_it).tied
    if shared and fixed.get("embedding_on_host"):
        raise ValueError(
            "host_embedding=true: the head shares the embedding's table and needs it on the "
            "device. Leave it out; embedding=8 halves the table."
        )
    ranks = [fixed["rank"]] if fixed.get("rank") else _halved(DEFAULT_RANK, LOWEST_RANK)
    lengths = [fixed["length"]] if fixed.get("length") else _halved(start, SHORTEST)
    widths = [fixed.get("bits")] if "bits" in fixed else list(BITS)
    batches = [fixed["batch_size"]] if fixed.get("batch_size") else _halved(4, 1)
    tables = [t | {k: fixed[k] for k in t if k in fixed} for t in TABLES]
    tables = [t for t in tables if not (shared and t["embedding_on_host"])]
    unique = [t for i, t in enumerate(tables) if t not in tables[:i]]
    for rank, length, bits, table, batch in product(ranks, lengths, widths, unique, batches):
        options = {"bits": bits, "rank": rank, "embedding": table["embedding"],
                   "head": table["head"]}  # fmt: skip
        yield (
            options,
            replace(
                chosen,
                batch_size=batch,
                accumulation=max(1, BATCH // batch),
                length=length,
                checkpointing=fixed.get("checkpointing", True),
                embedding_on_host=table["embedding_on_host"],
            ),
        )


def _halved(start: int, least: int) -> list[int]:
    found = [start]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _subject(configure: Configure, options: Mapping[str, Any]) -> Subject:
    return configure(**{k: v for k, v in options.items() if v is not None})


def _without_checkpointing(
    subject: Subject, step: TrainingSettings, peak: PeakMemory, *, room: int, start: int
) -> tuple[TrainingSettings, PeakMemory]:
    """Checkpointing off where there is room for it without having given up anything."""
    if step.length < start or step.batch_size < 4:
        return step, peak
    faster = replace(step, checkpointing=False)
    wider = predict(subject, faster)
    return (faster, wider) if wider.total <= room else (step, peak)


def _explain(
    subject: Subject,
    options: Mapping[str, Any],
    step: TrainingSettings,
    fixed: Mapping[str, Any],
    start: int,
    longest: int | None,
) -> Iterator[FitChoice]:
    def choice(name: str, value: object, reason: str, key: str | None = None) -> FitChoice:
        asked = (key or name) in fixed
        return FitChoice(name=name, value=str(value), reason="as asked" if asked else reason)

    if options["bits"] is not None:
        most = "the most that fits; more bits would need less context or another card"
        if options["bits"] == BITS[0]:
            most = "the most that quality asks for"
        yield choice("bits", options["bits"], most)
    full = options["rank"] == DEFAULT_RANK
    kept = "kept: it makes up for the bits" if full else "halved, as the last resort"
    yield choice("rank", options["rank"], kept)
    yield from _explain_tables(subject, options, step, choice)
    if step.length == start:
        reason = "the longest row of the data" if longest else "the default; --data shortens it"
    else:
        reason = f"halved from {start}: longer chats are left out, longer texts split"
    yield choice("context", step.length, reason, "length")
    yield choice("batch", f"{step.batch_size} x {step.accumulation}",
                 f"{step.batch_size * step.accumulation} rows a step", "batch_size")  # fmt: skip
    yield choice(
        "checkpointing",
        "on" if step.checkpointing else "off",
        "a third more time for a fraction of the memory" if step.checkpointing else "there is room",
    )


def _explain_tables(
    subject: Subject, options: Mapping[str, Any], step: TrainingSettings, choice: Any
) -> Iterator[FitChoice]:
    packed = options["embedding"] == 8
    reason = "costs next to no quality" if packed else "there is room for 16 bits"
    place = ", on the host" if step.embedding_on_host else ""
    yield choice("embedding", f"{options['embedding']} bits{place}", reason)
    if subject.tied:
        yield FitChoice(name="head", value="the embedding's table", reason="the two are tied")
    else:
        yield choice("head", f"{options['head']} bits", reason)


def _words(options: Mapping[str, Any], step: TrainingSettings) -> str:
    bits = f"{options['bits']} bits, " if options["bits"] is not None else ""
    host = ", embedding on the host" if step.embedding_on_host else ""
    return f"{bits}rank {options['rank']}, {step.batch_size} x {step.length} tokens{host}"


def _nothing(budget: int, room: int, peak: PeakMemory, words: str) -> str:
    largest = sorted(peak.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in largest)
    return (
        f"{budget / 1e9:.3g} GB: nothing fits. The least that training this model takes is "
        f"{peak.total / 1e9:.2f} GB ({words}: {parts}), and {room / 1e9:.2f} GB of the budget are "
        "left for tensors. Take a smaller model, or a card with more memory."
    )
