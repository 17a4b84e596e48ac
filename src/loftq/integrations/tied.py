"""A head tied to a packed embedding: one set of packed parameters in two modules.

transformers ties by a mapping of parameter names, {"lm_head.weight": "model.embed_tokens.weight"}.
Packed layers have no such parameter, so the mapping is written out for their components; tying
again, leaving the copies out of a save and moving devices then work as for a dense pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loftq.integrations.builders import BUILDERS
from loftq.nn import PackedLayer, replace_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def share_packed_(model: PreTrainedModel) -> list[str]:
    """Let every module that is tied to a packed one share its parameters; returns their paths.

    Call it once the owners are packed: on the meta device before the weights are read, or after
    packing in memory.

    Raises:
        ValueError: the tied module cannot read packed bytes, or is packed while its owner is dense.
    """
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shared, mapping = [], dict(ties)
    for target, source in ties.items():
        path, owner = target.removesuffix(".weight"), source.removesuffix(".weight")
        if not target.endswith(".weight") or not source.endswith(".weight"):
            continue
        there, here = _module(model, owner), _module(model, path)
        if isinstance(there, PackedLayer):
            mapping |= _share(model, path, owner, there)
            del mapping[target]
            shared.append(path)
        elif isinstance(here, PackedLayer):
            raise ValueError(
                f"{path} is packed, and its weight is tied to that of {owner}, which is not: the "
                "config does not belong to this model. Load the class that was quantized."
            )
    if shared:
        model.all_tied_weights_keys = mapping
        # Read when a model is asked to tie its weights again; a dict of its own, not the class'.
        model._tied_weights_keys = mapping
    return shared


def _share(model: nn.Module, path: str, owner: str, there: PackedLayer) -> dict[str, str]:
    """Pack the module at `path` around the parameters of `there`: names to tie."""
    here = model.get_submodule(path)
    if not isinstance(here, PackedLayer):
        here = replace_layer(model, path, there.spec, shape=there.packed_shape, builders=BUILDERS)
    here.compute_dtype = there.compute_dtype
    names = there.components()
    for name, parameter in names.items():
        here._parameters[name] = parameter
    return {f"{path}.{name}": f"{owner}.{name}" for name in names}


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
