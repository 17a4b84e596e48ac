"""What a user may choose about a training run; resolved once and written into its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace

from loftq.train.data.prepare import PROMPTS

CONFIG_VERSION = 1

DTYPES = ("auto", "bf16", "fp16", "fp32")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
LEARNING_RATES = {"sft": 2e-4, "preference": 1e-5}
"""Default learning rate of a LoRA by kind of data: preferences want a much gentler one."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What an optimizer needs."""

    state_bytes: int
    """Bytes of its states for each trained weight."""
    package: str | None = None
    """That it is in, if not in torch."""


OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(state_bytes=8),
    "adamw_8bit": Optimizer(state_bytes=2, package="bitsandbytes"),
    "paged_adamw_8bit": Optimizer(state_bytes=2, package="bitsandbytes"),
    "adamw_torch_8bit": Optimizer(state_bytes=2, package="torchao"),
}
"""By transformers' names."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every choice of `loftq train` about the training itself; the data has its own settings."""

    learning_rate: float | None = None
    """Of AdamW at its peak; None = 2e-4, for preferences 1e-5."""
    epochs: float = 3.0
    """Passes over the training rows, unless max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps, over epochs."""
    batch_size: int = 4
    """Rows in one forward and backward, on each device."""
    gradient_accumulation: int = 2
    """Batches that an optimizer step adds up."""
    packing: bool | None = None
    """Join short rows to full length, each attending to itself only; None = for plain text, where
    the model's attention keeps them apart."""
    checkpointing: bool = True
    """Keep only the inputs of each block and compute the rest again: much less memory, a third
    more time."""
    keep_blocks: int = 0
    """Of the last so many blocks keep everything, and compute the others again: faster by their
    share of that third, for memory that is there. With checkpointing, without offload."""
    fused: bool = True
    """Compute projections that share an input together, and norms, rotary embeddings and gates in
    one kernel each, wherever that is the same as PEFT's and transformers' own."""
    graphs: bool = False
    """Launch the kernels of a step all at once, as a CUDA graph for each of a few lengths: small
    models and short batches train up to several times as fast. Keeps the memory of every graph."""
    offload: bool = False
    """Keep the inputs of blocks in host memory between forward and backward: they take the memory
    of two blocks then. On a GPU, with checkpointing and without graphs."""
    host_embedding: bool = False
    """Keep the embedding table in host memory and fetch the rows of a batch: for a full GPU."""
    dtype: str = "auto"
    """Of the computation: bf16, fp16, fp32; auto = bf16 on a GPU that has it, else fp16, and fp32
    on a CPU. Adapters are float32 always."""
    optimizer: str = "adamw_torch_fused"
    """adamw_torch_fused; with 8-bit states adamw_8bit, paged_adamw_8bit (bitsandbytes),
    adamw_torch_8bit (torchao)."""
    scheduler: str = "cosine"
    """How the learning rate falls: cosine, linear, constant, constant_with_warmup."""
    warmup: float = 0.05
    """Steps in which it first rises: below 1 a share of all steps, else their number."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    eval_steps: int | None = None
    """Steps between validations; None = eight in a run."""
    save_steps: int | None = None
    """Steps between checkpoints, a multiple of eval_steps; None = at every validation."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk, the best and the last among them."""
    early_stop: int | None = None
    """Stop after so many validations without a better one; None = never."""
    beta: float = 0.1
    """Preferences only: how closely the policy is held to its reference."""
    samples: int = 3
    """Held-out prompts that are answered before and after; 0 = none."""
    sample_tokens: int = 64
    """Longest answer to one of them."""
    report_to: str = "none"
    """Also log to tensorboard, wandb or trackio."""
    seed: int = 0
    """Of the order of the rows and of everything else random."""

    def __post_init__(self) -> None:
        problem = self._check_numbers() or self._check_kept() or self._check_names()
        if problem:
            raise ValueError(problem)

    def _check_numbers(self) -> str:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                return f"{name}={value}: must be at least {least}."
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                return f"{name}={value}: must be positive."
        if self.samples > PROMPTS:
            return f"samples={self.samples}: at most {PROMPTS} prompts are held out."
        if self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
            return (
                f"save_steps={self.save_steps}: must be a multiple of eval_steps="
                f"{self.eval_steps}, so that checkpoints have a validation loss."
            )
        return ""

    def _check_kept(self) -> str:
        if self.keep_blocks and not self.checkpointing:
            return (
                f"keep_blocks={self.keep_blocks}: without checkpointing every block keeps its "
                "activations. Leave it out."
            )
        if self.keep_blocks and self.offload:
            return (
                f"keep_blocks={self.keep_blocks}: offload=true would move what those blocks keep. "
                "Choose one of them."
            )
        return ""

    def _check_names(self) -> str:
        for name, known in (
            ("dtype", DTYPES),
            ("optimizer", tuple(OPTIMIZERS)),
            ("scheduler", SCHEDULERS),
            ("report_to", TRACKERS),
        ):
            value = getattr(self, name)
            if value not in known:
                return f"{name}={value!r} does not exist; choose one of {', '.join(known)}."
        return ""

    def for_kind(self, kind: str) -> TrainConfig:
        """With the defaults that depend on the kind of data ("sft" or "preference") filled in."""
        rate = LEARNING_RATES[kind] if self.learning_rate is None else self.learning_rate
        return replace(self, learning_rate=rate)

    def steps(self, rows: int, processes: int = 1) -> Steps:
        """How many steps `rows` training rows take, and when to validate and save."""
        batch = self.batch_size * processes
        in_epoch = max(1, math.ceil(math.ceil(rows / batch) / self.gradient_accumulation))
        total = self.max_steps or max(1, math.ceil(self.epochs * in_epoch))
        every = self.eval_steps or max(1, math.ceil(total / 8))
        save = self.save_steps or every
        if save % every:  # only eval_steps = None can come here
            every = save
        warmup = int(self.warmup * total if self.warmup < 1 else self.warmup)
        return Steps(total=total, in_epoch=in_epoch, evaluate=every, save=save, warmup=warmup)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, with a version."""
        return {"version": CONFIG_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainConfig:
        """Inverse of to_dict.

        Raises:
            ValueError: a version or key this release does not know.
        """
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ValueError(f"config version {version} is not {CONFIG_VERSION}: update loftq.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(unknown_option(unknown[0], [f.name for f in fields(cls)]))
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimizer steps of a run."""

    total: int
    in_epoch: int
    evaluate: int
    """Steps between validations."""
    save: int
    """Steps between checkpoints, a multiple of `evaluate`."""
    warmup: int
    """Steps in which the learning rate rises; none in a run too short for its share."""


def missing_packages(config: TrainConfig, find: Callable[[str], object]) -> list[str]:
    """Packages that the chosen optimizer and tracker need and `find` does not find."""
    tracker = None if config.report_to == "none" else config.report_to
    names = (OPTIMIZERS[config.optimizer].package, tracker)
    return [name for name in names if name is not None and find(name) is None]


def unknown_option(name: str, known: list[str]) -> str:
    """Message for an option that does not exist, with the nearest one that does."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"unknown option {name!r}. {hint}Known: {', '.join(known)}."


_LEAST = {
    "keep_blocks": 0,
    "max_steps": 1, "batch_size": 1, "gradient_accumulation": 1, "warmup": 0, "weight_decay": 0,
    "eval_steps": 1, "save_steps": 1, "keep_checkpoints": 1, "early_stop": 1, "samples": 0,
    "sample_tokens": 1,
}  # fmt: skip
_POSITIVE = ("learning_rate", "epochs", "max_grad_norm", "beta")
