"""The anatomy of a model, read from its modules: blocks, head, what acts as a linear layer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SMALL_TABLE = 16  # an embedding with fewer rows (token types) has nothing to gain


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where things are; module paths as in `named_modules`."""

    base: str
    """Path of the base model; "" where the model is its own."""
    blocks: Mapping[str, int | None]
    """Path of each repeated block -> depth; None in towers beside the text model."""
    depth: int
    """Number of depths: blocks of the text model, decoder after encoder."""
    heads: frozenset[str]
    """Paths of the output embeddings, of parts of a composite model too."""
    tied: Mapping[str, str]
    """Module -> module whose weight it shares."""
    experts: frozenset[str]
    """Modules that hold the experts of a block, fused or one by one."""
    expert_counts: frozenset[int]
    """Numbers of experts that the configuration names."""

    def block_of(self, path: str) -> str | None:
        """The repeated block that holds the module, if any."""
        return next((holder for holder in _holders(path) if holder in self.blocks), None)

    def in_base(self, path: str) -> bool:
        """Whether the module belongs to the base model, not to a task's head."""
        return not self.base or path == self.base or path.startswith(self.base + ".")


def examine(model: nn.Module) -> Anatomy:
    """Read the anatomy of a model, which may be on the meta device."""
    base = _base_path(model)
    blocks, depth = _blocks(model, base)
    if not blocks and base:
        base = ""
        blocks, depth = _blocks(model, base)
    counts = _expert_counts(getattr(model, "config", None))
    return Anatomy(
        base=base,
        blocks=blocks,
        depth=depth,
        heads=frozenset(_heads(model)),
        tied=tied_modules(model),
        experts=frozenset(_experts(model, blocks, counts)),
        expert_counts=counts,
    )


def quantizable(module: nn.Module) -> str | None:
    """Kind of layer whose weight can be packed: linear, conv1d, embedding, or None.

    Subclasses of nn.Linear count when they compute what nn.Linear does (Falcon's), which is tried
    out on a small instance; embeddings only when they are nn.Embedding itself, without max_norm.
    """
    if isinstance(module, nn.Linear):
        plain = type(module) is nn.Linear or _computes_linear(type(module))  # type: ignore[arg-type]
        return "linear" if plain else None
    if type(module) is Conv1D:
        return "conv1d"
    if type(module) is nn.Embedding and module.max_norm is None:
        return "embedding"
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer of some kind, whether we can pack it or not."""
    return isinstance(module, nn.Linear | Conv1D)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a true convolution (GPT-2's Conv1D is a linear layer)."""
    return isinstance(module, _ConvNd)


def is_small_table(module: nn.Embedding, widths: set[int]) -> bool:
    """Whether an embedding is not of the model's width (position biases) or tiny (token types)."""
    return module.num_embeddings < SMALL_TABLE or bool(
        widths and module.embedding_dim not in widths
    )


def reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether the code of `parent` takes `self.NAME.weight` instead of calling the module.

    An adapter on such a module would never be applied: DeBERTa's table of relative positions.
    """
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(name)}\.weight\b", source) is not None


def _expert_counts(config: Any) -> frozenset[int]:
    """The numbers of experts that a configuration names."""
    counts: set[int] = set()
    for part in (config, text_config(config)):
        values = vars(part) if part is not None else {}
        counts |= {v for k, v in values.items() if "expert" in k and type(v) is int and v > 1}
    return frozenset(counts)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer, convolution or embedding."""
    weight = module.weight
    assert isinstance(weight, Tensor), type(weight)
    return weight


def _is_expert_stack(parameter: nn.Parameter, counts: frozenset[int]) -> bool:
    """Whether a parameter holds the weights of all experts of a block (one matrix each)."""
    return parameter.dim() == 3 and parameter.shape[0] in counts


def text_config(config: Any) -> Any:
    """The text model's part of a configuration, itself where it has no parts."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # none, or several
        return config


def raw_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the module itself that are matrices or stacks of them, biases left out."""
    for name, parameter in module.named_parameters(recurse=False):
        if "bias" not in name and sum(size > 1 for size in parameter.shape) >= 2:
            yield name, parameter


@cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether an instance with nn.Linear's parameters and nothing else acts as F.linear."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"), torch.no_grad():
            probe = kind.__new__(kind)
            nn.Linear.__init__(probe, 3, 2)
            x = torch.randn(4, 3, generator=generator)
            return torch.allclose(probe(x), F.linear(x, probe.weight, probe.bias), atol=1e-5)
    except Exception:  # whatever a foreign forward raises, it is not a plain linear layer
        return False


def _base_path(model: nn.Module) -> str:
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return next((path for path, module in model.named_modules() if module is base), "")


def _blocks(model: nn.Module, base: str) -> tuple[dict[str, int | None], int]:
    """Depth of each block: lists side by side in one module count together, others go on."""
    blocks: dict[str, int | None] = {}
    offsets: dict[tuple[str, int], int] = {}
    depth = 0
    for path, container in _block_lists(base, model.get_submodule(base)):
        main = _in_text_model(model, path)
        key = (path.rpartition(".")[0], len(container))
        if main and key not in offsets:
            offsets[key] = depth
            depth += len(container)
        for index, (name, _) in enumerate(container.named_children()):
            blocks[f"{path}.{name}"] = offsets[key] + index if main else None
    return blocks, depth


def _block_lists(
    path: str, module: nn.Module
) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists of blocks, in module order."""
    if path and isinstance(module, nn.ModuleList | nn.Sequential) and _is_block_list(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _block_lists(f"{path}.{name}".lstrip("."), child)


def _is_block_list(module: nn.ModuleList | nn.Sequential) -> bool:
    children = list(module.children())
    blocks = [child for child in children if not is_linear(child) and _holds_linears(child)]
    if isinstance(module, nn.ModuleList):
        return bool(blocks)
    return len(blocks) == len(children) > 1 and len({type(child) for child in children}) == 1


def _holds_linears(module: nn.Module) -> bool:
    return any(is_linear(inner) for inner in module.modules())


def _in_text_model(model: nn.Module, path: str) -> bool:
    """Whether the nearest transformers model around `path` is the text model, not a tower."""
    config = getattr(model, "config", None)
    text = text_config(config)
    if text is config or getattr(config, "is_encoder_decoder", False):
        return True
    around = (model.get_submodule(holder) for holder in _holders(path))
    nearest = next((m for m in around if isinstance(m, PreTrainedModel)), model)
    return type(getattr(nearest, "config", None)) in (type(config), type(text))


def _heads(model: nn.Module) -> Iterator[str]:
    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            with suppress(NotImplementedError, AttributeError):  # a model without words
                found.append(module.get_output_embeddings())
    heads = {id(head) for head in found if head is not None}
    yield from (path for path, module in model.named_modules() if id(module) in heads)


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Modules whose weight is another's: the same parameter now, or to be tied by transformers."""
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight") and parameter.dim() > 1:
            owner = first.setdefault(id(parameter), name)
            if owner != name:
                tied[name.removesuffix(".weight")] = owner.removesuffix(".weight")
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(".weight") and target != source:
            module, owner = target.removesuffix(".weight"), source.removesuffix(".weight")
            if module not in tied and owner not in tied:
                tied[module] = owner
    return tied


def _experts(
    model: nn.Module, blocks: Mapping[str, int | None], counts: frozenset[int]
) -> Iterator[str]:
    for path, module in model.named_modules():
        if any(_is_expert_stack(parameter, counts) for _, parameter in raw_matrices(module)):
            yield path
        elif isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) in counts:
            around = path.rpartition(".")[0]
            if _holds_linears(module) and any(holder in blocks for holder in _holders(around)):
                yield path


def _holders(path: str) -> Iterator[str]:
    """The path itself, then every module around it, innermost first; "" is left out."""
    while path:
        yield path
        path = path.rpartition(".")[0]
