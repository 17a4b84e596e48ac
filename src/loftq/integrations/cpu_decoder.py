"""Token by token on a CPU: one call of the C++ library a token, where the model is a Llama's like.

A step of SmolLM2-135M in transformers runs over a thousand small operators, each of which takes
Python longer than its arithmetic. The prompt goes the ordinary way, through the model's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loftq.integrations.decode import Decoder
from loftq.integrations.llama_like import NotReadable, read_model
from loftq.ops.cpu.decoder import TokenStep
from loftq.ops.cpu.library import why_no_library


def why_no_cpu_decoder(model: Any, capacity: int = 1) -> str:
    """Reason that the library cannot take this model's steps, or "".

    Args:
        model: a causal language model, bare or in PEFT.
        capacity: tokens of prompt and answer.
    """
    if why := why_no_library():
        return why
    try:
        read_model(model, capacity)
    except NotReadable as error:
        return str(error)
    return ""


class CpuDecoder(Decoder):
    """Decoding of one sequence, its steps in the CPU library; adapters stay unmerged.

    Between the projections everything is float32, also where the model is bfloat16. The model's
    tensors are read anew by each `prefill`: an adapter may be switched in between, not during an
    answer.

    Args:
        model: a causal language model, or a PEFT model around one, in eval mode on the CPU.
        max_length: tokens that the cache holds, prompt included.

    Raises:
        NotReadable: `why_no_cpu_decoder` says why.
        ValueError: max_length below 2.
    """

    def __init__(self, model: Any, *, max_length: int) -> None:
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: expected at least 2.")
        if why := why_no_cpu_decoder(model, max_length):
            raise NotReadable(why)
        self.model, self.batch, self.max_length = model, 1, max_length
        self.length = 0
        self._embed = model.get_input_embeddings()
        self._cache: tuple[Tensor, Tensor] | None = None
        self._step: TokenStep | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Start over with a prompt (1, length); logits (1, vocab) of what follows it.

        Raises:
            ValueError: several prompts, or no room for a new token.
            NotReadable: the model has changed into one that the library does not know.
        """
        from transformers import DynamicCache

        self.check_prompt(tokens)
        tensors = read_model(self.model, self.max_length)
        filled = DynamicCache()
        output = self.model(
            input_ids=tokens, past_key_values=filled, use_cache=True, logits_to_keep=1
        )
        length = tokens.shape[1]
        keys, values = self._room(filled.layers[0].keys, len(tensors.blocks))
        for i, layer in enumerate(filled.layers):
            keys[i, :, :length], values[i, :, :length] = layer.keys[0], layer.values[0]
        self._step = TokenStep(tensors, keys, values)
        self.length = length
        return output.logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token (1,) or (1, 1); logits (1, vocab) float32 of what follows.

        Raises:
            ValueError: the cache is full, or nothing was prefilled.
        """
        self.check_room()
        assert self._step is not None
        logits = self._step(self._embed(tokens.view(1))[0], self.length)
        self.length += 1
        return logits[None]

    def _room(self, like: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (blocks, kv_heads, max_length, head_size) each; reused if they fit."""
        _, heads, _, size = like.shape
        shape = (blocks, heads, self.max_length, size)
        if self._cache is None or (self._cache[0].shape, self._cache[0].dtype) != (
            shape,
            like.dtype,
        ):
            self._cache = like.new_empty(shape), like.new_empty(shape)
        return self._cache
