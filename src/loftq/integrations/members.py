"""Trained adapters of one backbone in one model: read, stacked, and their predictions averaged.

A forward of the model is a forward of all members: the rows of a batch are repeated for each
(nn/members.py), and what comes out is the logarithm of the mean probability. So whatever takes
logits - a metric, `generate`, a decoder of CUDA graphs - works with the ensemble as with one model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.integrations.peft import backbone_of, check_lineage, scaling_of
from loftq.nn.members import attach_members_, for_members
from loftq.pipeline.plan import ADAPTER_PREFIX

ENSEMBLE = "ensemble.json"
"""In the folder of an ensemble: its members."""
BY_ROW = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids",
)  # fmt: skip
"""Arguments of a forward that have one entry for each row of the batch."""
PREDICTED = ("logits", "start_logits", "end_logits")
"""What a model of transformers predicts, the classes (tokens, positions) along the last axis."""


class MembersError(ValueError):
    """Adapters that cannot be computed together; says why."""


def member_folders(path: Path) -> tuple[Path, ...] | None:
    """The runs of an ensemble's folder; None for any other folder.

    Raises:
        MembersError: its record is damaged, or a member is not trained yet.
    """
    file = path / ENSEMBLE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["members"]
        runs = tuple(path / str(name) for name in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MembersError(f"{file}: cannot be read ({error!r}). Restore it.") from error
    done = [(run / "adapter" / "adapter_config.json").is_file() for run in runs]
    if not all(done):
        raise MembersError(
            f"{path}: {sum(done)} of {len(runs)} members are trained. Give the command that began "
            "it again (`loftq lab ensemble` with the same options): it goes on."
        )
    return runs


def load_members_(model: Any, adapters: Sequence[Path]) -> None:
    """Put the adapters into the model, their heads too, in place; it then takes repeated rows.

    Args:
        model: packed, in the class that the adapters were trained in, without an adapter.
        adapters: standard PEFT folders of one rank and one set of layers, in the order of members.

    Raises:
        LineageError: one belongs to another backbone.
        MembersError: an encoder-decoder, or adapters that differ in more than their values.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise MembersError(
            f"{type(model).__name__}: an encoder-decoder; members are computed together for "
            "encoders and decoders."
        )
    for folder in adapters:
        check_lineage(folder, backbone_of(model))
    states = [_read(folder) for folder in adapters]
    for folder, state in zip(adapters, states, strict=True):
        if _shapes(state) != _shapes(states[0]):
            raise MembersError(
                f"{folder}: other layers or another rank than {adapters[0]}. Members share both."
            )
    dtype = getattr(model, "dtype", torch.float32)
    factors, heads = {}, {}
    for path, parameter in _places(states[0]):
        each = [state[path] for state in states]
        if parameter == "lora":
            factors[path] = (
                torch.stack([found["A"] for found in each]).to(dtype),
                torch.stack([found["B"] for found in each]).to(dtype),
            )
        else:
            heads[path] = each
    attach_members_(model, factors, heads, scaling=1.0)
    model.requires_grad_(False)


def average_(model: Any, members: int) -> tuple[Any, ...]:
    """From now on the model takes the rows once and gives log((1 / M) sum_m softmax(logits_m)).

    Args:
        model: from `load_members_`.
        members: M.

    Returns:
        Hooks; their `remove()` ends it.

    Raises:
        MembersError: its head predicts a number, which has no probability to be averaged.
    """
    if getattr(model.config, "problem_type", None) == "regression":
        raise MembersError(
            f"{type(model).__name__}: predicts a number; probabilities are averaged."
        )

    return (
        model.register_forward_pre_hook(_Repeat(members), with_kwargs=True),
        model.register_forward_hook(_Average(members), with_kwargs=True),
    )


@dataclass(frozen=True)
class _Repeat:
    members: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            args, kwargs = (), {"input_ids": args[0], **kwargs}
        # The loss of the mean is not the mean of the losses: the model is to find neither.
        kept = {name: value for name, value in kwargs.items() if name != "labels"}
        return args, kept | _repeated({n: kept[n] for n in BY_ROW if n in kept}, self.members)


@dataclass(frozen=True)
class _Average:
    members: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        for name in PREDICTED:
            if output.get(name) is not None:
                output[name] = log_mean(output[name], self.members)
        return output


def is_average(hook: object) -> bool:
    """Whether a hook of a forward is one of `average_`."""
    return isinstance(hook, _Repeat | _Average)


def averaged_members(model: nn.Module) -> int:
    """M if a forward of the model gives the mean of M members, else 1."""
    found = [hook.members for hook in model._forward_hooks.values() if isinstance(hook, _Average)]
    return found[0] if found else 1


def log_mean(logits: Tensor, members: int) -> Tensor:
    """log((1 / M) sum_m softmax(logits_m)): (M x rows, ..., classes) -> (rows, ..., classes).

    In float32: a model gives its logits in 16 bits, and probabilities are what is averaged.
    """
    each = logits.unflatten(0, (members, -1)).float().log_softmax(-1)
    return each.logsumexp(0) - math.log(members)


def _repeated(inputs: Mapping[str, Any], members: int) -> dict[str, Any]:
    """Those with an entry a row, once for each member; one that all rows share stays as it is."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    rows = max((len(value) for value in tensors.values()), default=0)
    return for_members({n: v for n, v in tensors.items() if len(v) == rows}, members)


def _read(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Path -> {"A", "B"} with the factor s in B, or the state dict of a head."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(folder))
    if config.use_dora or config.bias != "none":
        raise MembersError(f"{folder}: DoRA or trained biases; members are plain LoRA.")
    settings, found = config.to_dict(), dict[str, dict[str, Tensor]]()
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        path, _, name = key.removeprefix(ADAPTER_PREFIX).rpartition(".")
        if "lora_embedding" in name:
            raise MembersError(f"{folder}: {key} adapts an embedding; members adapt layers.")
        layer, _, factor = path.rpartition(".lora_")
        if factor in ("A", "B"):
            scale = scaling_of(settings, layer) if factor == "B" else 1.0
            found.setdefault(layer, {})[factor] = scale * value
        else:
            found.setdefault(path, {})[name] = value
    return found


def _places(state: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, str]]:
    for path, found in state.items():
        yield path, "lora" if found.keys() == {"A", "B"} else "head"


def _shapes(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, torch.Size]]:
    return {p: {n: t.shape for n, t in sorted(found.items())} for p, found in state.items()}
