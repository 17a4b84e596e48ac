"""The options of a run on a task: the task's, the training's, the quantization's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from loftq.pipeline.config import QuantizeConfig
from loftq.tasks.base import Reading, Task
from loftq.train.config import CONFIG_VERSION, TrainConfig, unknown_option

BASELINES = ("full", "lora16")
"""Values of `method` that leave the model unquantized: full fine-tuning, and LoRA on it."""
NOT_HERE = frozenset({"packing", "beta", "sample_tokens", "host_embedding", "offload"})
"""Fields of TrainConfig that mean nothing for a task."""
QUANTIZE_NOT_HERE = frozenset({"data", "seed"})
"""Fields of QuantizeConfig: `data` is the task's, `seed` the training's."""
LORA = ("rank", "alpha", "rslora", "targets", "skip", "embeddings")
"""Fields of QuantizeConfig that lora16 has a use for."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Choices about the task itself."""

    max_length: int | None = None
    """Tokens of a row; None = the task's default, at most what the model reads."""
    train_rows: int | None = None
    """Train on the first so many rows of a fixed shuffle; None = all."""
    eval_rows: int | None = None
    """Score the first so many rows of a fixed shuffle of each reported split; None = all."""
    holdout: float = 0.05
    """Share of train that the checkpoint is chosen by, where there is no validation split."""
    validation_rows: int | None = None
    """Choose the checkpoint by the first so many held-out rows of a fixed shuffle; None = all."""
    on_bad_rows: str = "error"
    """error, or skip: leave rows that cannot be used out of training. A reported split is never
    thinned, which would change what is measured."""
    eval_batch_size: int = 32
    """Rows at a time when predicting."""
    answer_tokens: int | None = None
    """Most tokens of a generated answer; None = the task's default."""
    beams: int = 1
    """Of a generated answer; 1 = greedy."""
    kl: float = 0.0
    """Weight of KL(model || start), nats a prediction, in the loss: holds predictions near those
    before training. Members of an ensemble are less sure with it."""
    quantize_seed: int = 0
    """Of the quantization. `seed` is the training's, so that runs of several seeds share one
    backbone."""
    calibration: str | None = None
    """Text to calibrate on, for methods of quantization that need it."""

    def __post_init__(self) -> None:
        for name in ("max_length", "train_rows", "eval_rows", "validation_rows", "eval_batch_size",
                     "answer_tokens", "beams"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1.")
        if self.on_bad_rows not in ("error", "skip"):
            raise ValueError(f"on_bad_rows={self.on_bad_rows!r}: choose error or skip.")
        if not 0 <= self.kl < float("inf"):
            raise ValueError(f"kl={self.kl}: must be 0 or more.")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout={self.holdout}: must lie between 0 and 1.")

    def reading(self) -> Reading:
        """How the model is asked for predictions."""
        return Reading(
            batch_size=self.eval_batch_size,
            max_length=self.max_length,
            answer_tokens=self.answer_tokens,
            beams=self.beams,
        )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options, sorted."""

    method: str | None
    """As given; None = the quantization's default, or a model that is packed already."""
    config: TrainConfig
    """With the task's defaults where nothing was given."""
    task: TaskConfig
    quantize: Mapping[str, Any]
    """Those that were given, for a model that is full precision; of lora16 those of LORA."""

    def settings(self, model: str, task: Task, data: str | None) -> dict[str, Any]:
        """config.yaml: everything that decides the result, under the names of the options."""
        named = {"model": model, "task": task.name, "data": data, "method": self.method}
        quantize = {k: list(v) if isinstance(v, tuple) else v for k, v in self.quantize.items()}
        config = {k: v for k, v in self.config.to_dict().items() if k not in NOT_HERE | {"version"}}
        return {"version": CONFIG_VERSION, **named, **quantize, **asdict(self.task), **config}


def option_types() -> dict[str, Any]:
    """Every option with its type, `method` among those of the quantization."""
    return {
        **_types(TrainConfig, NOT_HERE),
        **_types(TaskConfig),
        **_types(QuantizeConfig, QUANTIZE_NOT_HERE),
    }


def choose(task: Task, options: Mapping[str, Any]) -> Chosen:
    """Options over the task's defaults, sorted into settings.

    Raises:
        ValueError: an option that does not exist, that the method has no use for, or out of range.
    """
    known = option_types() | {"seed": int}
    for name in options:
        if name not in known:
            raise ValueError(unknown_option(name, list(known)))
    method = options.get("method")
    own = _of(TaskConfig, options)
    training = _of(TrainConfig, {**task.defaults, **options})
    quantize = {k: v for k, v in _of(QuantizeConfig, options).items() if k not in QUANTIZE_NOT_HERE}
    quantize.pop("method", None)
    if method in BASELINES:
        allowed = LORA if method == "lora16" else ()
        useless = sorted(set(quantize) - set(allowed))
        if useless:
            raise ValueError(f"method={method}: {', '.join(useless)} would change nothing.")
    elif method is not None:
        quantize["method"] = method
    if own.get("kl") and (method == "full" or not task.predicts_probabilities):
        why = "every weight is trained" if method == "full" else f"{task.name} predicts a number"
        raise ValueError(
            f"kl={own['kl']}: compares the probabilities of adapters, and {why}. Leave it out; "
            "weight_decay works with it."
        )
    return Chosen(
        method=method, config=TrainConfig(**training), task=TaskConfig(**own), quantize=quantize
    )


def _of(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _types(kind)}


def _types(kind: type, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.name not in without}
