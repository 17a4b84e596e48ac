"""The peak of a training step, by part.

A step has a few moments that can be its peak: the loss, its backward, the backward of the last
block (everything kept, the fewest gradients), that of the first block (the least kept, all
gradients) and the optimizer's step. Weights, adapters and optimizer states are there in all of
them. The figure is that of torch.cuda.max_memory_allocated on a GPU, without the CUDA context and
the allocator's reserve (`budget.py`); on a CPU it is the tensors, those mapped from files included,
without what the heap of the C library holds on to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch

from loftq.train.config import OPTIMIZERS
from loftq.train.keep import require_blocks
from loftq.train.memory.loss import KINDS, HeadOfLoss, loss_bytes
from loftq.train.memory.probe import BlockCost, Step, block_cost
from loftq.train.memory.subject import BACKBONE, EMBEDDING, HEAD, Subject
from loftq.train.offload import NEWEST

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORKSPACE = 32 << 20
"""Of cuBLAS, one for each thread that computes, which is one here; bytes on Hopper, a quarter of it
before."""
PARTS = (
    "backbone", "embedding", "head", "adapters", "gradients", "optimizer", "activations", "logits",
    "other",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the peak depends on besides the model."""

    batch_size: int = 1
    """Rows in one forward and backward."""
    length: int = 1024
    """Tokens of a row."""
    accumulation: int = 1
    """Batches that an optimizer step adds up."""
    dtype: str = "bf16"
    """Of weights outside of the packed layers and of activations: bf16, fp16, fp32."""
    checkpointing: bool = True
    """Keep the inputs of each block only."""
    keep_blocks: int = 0
    """The last blocks, of which everything is kept all the same."""
    optimizer: str = "adamw_torch_fused"
    """A key of OPTIMIZERS (train/config.py)."""
    fused: bool = True
    """With the training layer (loftq.integrations.training)."""
    loss: str = "chunked"
    """chunked (TRL's) or full (all logits at once)."""
    embedding_on_host: bool = False
    """The embedding is in host memory (`loftq.load(..., embedding="host")`)."""
    offload: bool = False
    """Inputs of blocks are in host memory between forward and backward (loftq.train.offload)."""
    padded: bool | None = None
    """Whether rows are padded, which takes a mask; None = if there are several."""
    device: str = "cuda"
    """cuda or cpu."""

    def __post_init__(self) -> None:
        known: Mapping[str, Collection[str]] = {
            "dtype": DTYPES,
            "optimizer": OPTIMIZERS,
            "loss": KINDS,
            "device": ("cuda", "cpu"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(choices)}.")
        for name in ("batch_size", "length", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.keep_blocks and (self.offload or not self.checkpointing):
            raise ValueError(
                f"keep_blocks={self.keep_blocks}: only with checkpointing, and not with offload."
            )

    @property
    def tokens(self) -> int:
        """Tokens of a forward and backward, padding included."""
        return self.batch_size * self.length


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes at the peak of a training step, by part."""

    backbone: int
    """Packed layers of the blocks, norms, biases."""
    embedding: int
    head: int
    """0 where it is the embedding's table."""
    adapters: int
    gradients: int
    """Of the adapters, as far as they exist at the peak."""
    optimizer: int
    activations: int
    """What blocks keep, and what one block takes while it is differentiated."""
    logits: int
    """The loss; 0 if the peak is elsewhere."""
    other: int
    """Kept outside of the blocks: last norm, rotary tables, mask, ids; workspaces of cuBLAS."""
    moment: str
    """When the peak is: a key of `_moments`."""
    host: int = 0
    """Bytes in host memory besides: an embedding, inputs of blocks."""

    @property
    def total(self) -> int:
        """All parts on the device."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, in the order of PARTS."""
        return {part: getattr(self, part) for part in PARTS}

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {**asdict(self), "total": self.total}


def predict(subject: Subject, settings: TrainingSettings) -> PeakMemory:
    """The peak of training `subject` as `settings` say; reads no weight and computes nothing.

    Raises:
        UnknownModel: the model cannot be walked through.
        TrainError: it has fewer blocks than are to be kept.
    """
    require_blocks(settings.keep_blocks, subject.blocks)
    fixed, host = _fixed(subject, settings)
    cost = cost_of(subject, settings)
    moments = _moments(subject, settings, cost, DTYPES[settings.dtype])
    if settings.offload:
        host += subject.blocks * cost.kept
    moment, variable = max(moments.items(), key=lambda item: sum(item[1].values()))
    return PeakMemory(**fixed, **variable, moment=moment, host=host)


def fixed_bytes(subject: Subject, settings: TrainingSettings) -> int:
    """Bytes that are on the device at every moment of a step: weights and optimizer."""
    return sum(_fixed(subject, settings)[0].values())


def cost_of(subject: Subject, settings: TrainingSettings) -> BlockCost:
    """The cost of one block under `settings`; remembered, since it does not depend on the bits."""
    padded = settings.batch_size > 1 if settings.padded is None else settings.padded
    step = Step(
        batch_size=settings.batch_size,
        length=settings.length,
        dtype=DTYPES[settings.dtype],
        autocast=settings.dtype != "fp32",
        checkpointing=settings.checkpointing,
        fused=settings.fused,
        padded=padded,
        device=settings.device,
    )
    return _cached_cost(_Key(subject), step)


def _whole_cost(subject: Subject, settings: TrainingSettings) -> BlockCost:
    """Of a block that keeps everything."""
    return cost_of(subject, replace(settings, checkpointing=False, keep_blocks=0))


def _fixed(subject: Subject, settings: TrainingSettings) -> tuple[dict[str, int], int]:
    """Bytes of weights and optimizer by part, and those in host memory."""
    trained = subject.adapter_parameters
    fixed = {
        **_weights(subject, DTYPES[settings.dtype].itemsize),
        "adapters": 4 * trained,
        "optimizer": OPTIMIZERS[settings.optimizer].state_bytes * trained,
    }
    host = fixed["embedding"] if settings.embedding_on_host and not subject.tied else 0
    if host:
        fixed["embedding"] = 0
    return fixed, host


def _weights(subject: Subject, item: int) -> dict[str, int]:
    """Bytes of backbone, embedding and head on the device."""
    tables = {path: role for role, path in subject.tables.items()}
    sizes = {role: count * item for role, count in subject.dense.items()}
    for weight in subject.weights:
        sizes[tables.get(weight.info.module, BACKBONE)] += weight.nbytes
    return {"backbone": sizes[BACKBONE], "embedding": sizes[EMBEDDING], "head": sizes[HEAD]}


def _moments(
    subject: Subject, settings: TrainingSettings, cost: BlockCost, dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    """Gradients, activations, logits and the rest at each moment that can be the peak."""
    gradients = 4 * subject.adapter_parameters
    per_block = gradients // subject.blocks
    more = settings.keep_blocks
    whole = _whole_cost(subject, settings) if more else cost
    held, last = _inputs_held(subject, settings)
    kept = (held - more) * cost.kept + more * whole.kept
    # From the second batch of an accumulation on, all gradients are there all the time.
    early = gradients if settings.accumulation > 1 else 0
    other = cost.outside + (WORKSPACE if settings.device == "cuda" else 0)
    before, after = (_logits(subject, settings, dtype, backward=b) for b in (False, True))
    # Of layers that run PEFT's forward, until the whole forward, loss included, ends.
    copies = subject.blocks * cost.copies

    def moment(gradients: int, activations: int, logits: int = 0, other: int = other) -> dict:
        return {
            "gradients": gradients, "activations": activations, "logits": logits, "other": other,
        }  # fmt: skip

    # The gradients of a block that is being differentiated are part of what it takes.
    rest = max(0, gradients - per_block)
    return {
        "loss": moment(early, kept, before, other + copies),
        "backward of the loss": moment(early, kept, after),
        "last block": moment(rest if early else 0, kept + whole.working),
        "last block that is computed again": moment(
            rest if early else more * per_block, (held - more) * cost.kept + cost.working
        ),
        "first block": moment(rest, last * cost.kept + cost.working),
        "optimizer": moment(gradients, 0, 0, other - cost.outside),
    }


def _inputs_held(subject: Subject, settings: TrainingSettings) -> tuple[int, int]:
    """Inputs of blocks on the device when the backward begins, and in that of the first block."""
    if settings.offload:
        newest = min(subject.blocks, NEWEST)
        return newest, newest  # the one before is fetched meanwhile
    return subject.blocks, 1


def _logits(
    subject: Subject, settings: TrainingSettings, dtype: torch.dtype, *, backward: bool
) -> int:
    head = HeadOfLoss(
        vocabulary=subject.vocabulary, hidden=subject.hidden, packed=subject.packed_head
    )
    return loss_bytes(
        head,
        kind=settings.loss,
        tokens=settings.tokens,
        dtype=dtype,
        device=settings.device,
        backward=backward,
    )


@dataclass(frozen=True, eq=False)
class _Key:
    """A subject as a key: everything that the cost of a block depends on."""

    subject: Subject

    @property
    def _identity(self) -> tuple[object, ...]:
        layers = tuple(
            (w.info.module, w.info.shape, w.rank) for w in self.subject.weights if w.rank
        )
        return self.subject.name, layers

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._identity == other._identity


@lru_cache(maxsize=512)
def _cached_cost(key: _Key, step: Step) -> BlockCost:
    return block_cost(key.subject, step)
