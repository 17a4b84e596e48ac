"""Models whose decoder layers loftq runs by itself when it decodes, and what speaks against one.

A layer is norm, attention with rotary embedding, norm, gated SiLU. Llama, Mistral, Qwen2 and Qwen3
differ in biases and in norms of heads only, which are read from the modules. A model counts only
when it is of transformers' own class: a class of the same shape may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loftq.integrations.guard import is_guard

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
READ_ONE_INPUT = ("q_proj", "k_proj", "v_proj")
"""Names of the projections of an attention that read the same input."""


def without_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_no_family(
    base: Any, capacity: int | None = None, known: Callable[[object], bool] = is_guard
) -> str:
    """Reason that the layers of a transformers model have to run by themselves, or "".

    Args:
        base: without PEFT around it.
        capacity: tokens that the cache is to hold; an attention that slides over as many or more
            reads all of them. None = a window of any length is refused.
        known: whether a hook need not run: it computes nothing, or the caller does what it does.
    """
    import transformers

    name, act = type(base).__name__, getattr(base.config, "hidden_act", "silu")
    if name not in FAMILIES or type(base) is not getattr(transformers, name):
        return f"{name} is none of transformers' {', '.join(FAMILIES)}"
    if act not in ("silu", "swish"):
        return f"its activation is {act}, not silu"
    window = _shortest_window(base)
    if window is not None and (capacity is None or window < capacity):
        wanted = "the whole context is wanted" if capacity is None else f"{capacity} are wanted"
        return f"its attention slides over {window} tokens, {wanted}"
    for path, module in base.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(known(hook) for hook in hooks):
            return f"{path or name} has hooks, which would not run"
    return ""


def _shortest_window(base: Any) -> int | None:
    """Tokens that the shortest sliding attention sees; None if every layer sees all."""
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in base.model.layers}
    if type(base).__name__ == "MistralForCausalLM":  # its layers read the config
        windows.add(base.config.sliding_window)
    return min((window for window in windows if window is not None), default=None)
