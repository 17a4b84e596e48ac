"""Which changes of settings would save most, with the bytes of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from loftq.formats import parse_format
from loftq.pipeline.config import TABLE_FORMAT
from loftq.train.memory.predict import PeakMemory, TrainingSettings, predict
from loftq.train.memory.subject import EMBEDDING, Subject

SHORTEST = 256
"""Tokens below which a shorter context is not proposed."""
SHOWN = 2


@dataclass(frozen=True, kw_only=True)
class Saving:
    """One change and what it saves at the peak."""

    change: str
    """As the user would write it, key=value."""
    saved: int
    """Bytes."""
    cost: str
    """What is given up for it."""

    @property
    def gigabytes(self) -> float:
        """Saved, in 10^9 bytes."""
        return self.saved / 1e9


def savings(
    subject: Subject,
    settings: TrainingSettings,
    *,
    count: int = SHOWN,
    without: Collection[str] = (),
) -> tuple[Saving, ...]:
    """The changes that save most, largest first; only those that save anything.

    Each is predicted as a whole, so that a change which moves the peak elsewhere counts for what it
    really saves. Changes of settings come without a new quantization; those of the backbone say so.

    Args:
        subject: the model.
        settings: as they are now.
        count: how many.
        without: names of settings that cannot be changed here.

    Raises:
        UnknownModel: the model cannot be walked through.
    """
    now = predict(subject, settings).total
    found = [
        Saving(change=change, saved=now - after.total, cost=cost)
        for change, cost, after in _changes(subject, settings)
        if after.total < now and change.partition("=")[0] not in without
    ]
    return tuple(sorted(found, key=lambda saving: -saving.saved)[:count])


def _changes(subject: Subject, settings: TrainingSettings) -> Iterator[tuple[str, str, PeakMemory]]:
    yield from _step_changes(subject, settings)
    if not (subject.tied or settings.embedding_on_host):
        changed = replace(settings, embedding_on_host=True)
        yield "host_embedding=true", "rows are fetched from the host", predict(subject, changed)
    rank = max(w.rank for w in subject.weights) // 2
    if rank >= 4:
        text = "a smaller adapter; quantize again"
        yield f"rank={rank}", text, predict(subject.with_rank(rank), settings)
    yield from _packing_changes(subject, settings)


def _step_changes(
    subject: Subject, settings: TrainingSettings
) -> Iterator[tuple[str, str, PeakMemory]]:
    if not settings.checkpointing:
        changed = replace(settings, checkpointing=True)
        yield "checkpointing=true", "a third more time", predict(subject, changed)
    elif settings.keep_blocks:
        changed = replace(settings, keep_blocks=0)
        yield "keep_blocks=0", "those blocks are computed again", predict(subject, changed)
    elif settings.device == "cuda" and not settings.offload:
        changed = replace(settings, offload=True)
        yield "offload=true", "memory of the host instead", predict(subject, changed)
    if settings.batch_size > 1:
        # The largest divisor, so that a step keeps its rows and the run can go on.
        size = settings.batch_size
        half = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        times = settings.accumulation * (size // half)
        changed = replace(settings, batch_size=half, accumulation=times)
        text = f"batch_size={half} gradient_accumulation={times}"
        yield text, "nothing but some speed", predict(subject, changed)
    elif settings.length >= 2 * SHORTEST:
        changed = replace(settings, length=settings.length // 2)
        yield f"max_length={changed.length}", "longer chats are left out", predict(subject, changed)
    if settings.loss == "full":
        yield "loss=chunked", "nothing", predict(subject, replace(settings, loss="chunked"))
    if settings.optimizer == "adamw_torch_fused":
        changed = replace(settings, optimizer="adamw_8bit")
        yield "optimizer=adamw_8bit", "moments in 8 bits", predict(subject, changed)


def _packing_changes(
    subject: Subject, settings: TrainingSettings
) -> Iterator[tuple[str, str, PeakMemory]]:
    """Fewer bits, which need a new quantization."""
    adapted = [w for w in subject.weights if w.rank]
    bits = max(w.spec.bits for w in adapted)
    if bits > 2:
        lower = parse_format({4: "nf3-g64-dq", 3: "nf2-g64-dq"}.get(bits, "nf4-g64-dq"))
        weights = (replace(w, spec=lower) if w.rank else w for w in subject.weights)
        fewer = replace(subject, weights=tuple(weights))
        text = "some quality; quantize again"
        yield f"bits={lower.bits}", text, predict(fewer, settings)
    for role in subject.tables:
        if subject.dense[role]:
            smaller = subject.with_packed_table(role, parse_format(TABLE_FORMAT))
            key = EMBEDDING if subject.tied else role
            yield f"{key}=8", "next to no quality; quantize again", predict(smaller, settings)
