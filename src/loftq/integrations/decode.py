"""Token by token from a static cache; on a GPU each step is one CUDA graph.

A step of a 7B model launches over a thousand kernels of a few microseconds: launched one by one
from Python they take ten times as long as they run. The graph is captured once, on the model as it
is: adapters stay unmerged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loftq.integrations.fused_step import FusedStep


class Decoder(ABC):
    """Takes a batch of sequences further, one token of each at a time."""

    model: Any
    batch: int
    max_length: int
    """Tokens that the cache holds, prompt included."""
    length: int
    """Tokens in the cache."""

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Tensor:
        """Start over with prompts (batch, length); logits (batch, vocab) of what follows them."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch,) or (batch, 1); logits (batch, vocab) of what follows."""

    def check_prompt(self, tokens: Tensor) -> None:
        """Raise unless a prompt of this shape leaves room for a token.

        Raises:
            ValueError: another batch, or no room for a new token.
        """
        if tokens.shape[0] != self.batch or not 0 < tokens.shape[1] < self.max_length:
            raise ValueError(
                f"prompts of shape {tuple(tokens.shape)}: expected ({self.batch}, 1 to "
                f"{self.max_length - 1})."
            )

    def check_room(self) -> None:
        """Raise unless a step can be taken.

        Raises:
            ValueError: the cache is full, or nothing was prefilled.
        """
        if not 0 < self.length < self.max_length:
            raise ValueError(
                f"{self.length} of {self.max_length} tokens are in the cache: prefill first, or "
                "make a decoder with a larger max_length."
            )

    def generate(self, tokens: Tensor, *, max_new_tokens: int, stop: int | None = None) -> Tensor:
        """Prompts (batch, length) and the likeliest continuation, (batch, length + new).

        Args:
            tokens: equally long prompts, without padding.
            max_new_tokens: at most; the cache may hold fewer.
            stop: token after which a sequence repeats itself; ends early when all have.
        """
        chosen = [self.prefill(tokens).argmax(-1)]
        for _ in range(min(max_new_tokens, self.max_length - tokens.shape[1]) - 1):
            done = None if stop is None else chosen[-1] == stop
            if done is not None and bool(done.all()):
                break
            token = self.step(chosen[-1]).argmax(-1)
            chosen.append(token if done is None else torch.where(done, chosen[-1], token))
        return torch.cat([tokens.to(chosen[0].device), torch.stack(chosen, 1)], 1)


class GraphDecoder(Decoder):
    """Greedy decoding of one batch of equally long prompts.

    Args:
        model: a causal language model, or a PEFT model around one, in eval mode on one device.
        batch: sequences decoded together.
        max_length: tokens that the cache holds, prompt included.
        fused: whether layers that are known run from our own kernels (fused_step.py), which round
            a little differently; None = on a GPU. `not_fused` says why they do not.

    Raises:
        ValueError: sizes below 1, or a model spread over devices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch: int = 1,
        max_length: int,
        fused: bool | None = None,
    ) -> None:
        from transformers import StaticCache

        from loftq.integrations.fused_step import FusedStep, why_not_fused

        devices = {parameter.device for parameter in model.parameters()}
        if batch < 1 or max_length < 2:
            raise ValueError(f"batch={batch}, max_length={max_length}: expected at least 1 and 2.")
        if len(devices) != 1:
            raise ValueError(
                f"the model lies on {sorted(map(str, devices))}; a step is captured on one device. "
                "Load it with device_map={'': 0}."
            )
        self.model, self.batch, self.max_length = model, batch, max_length
        (self.device,) = devices
        self.length = 0
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=max_length)
        self._token = torch.zeros((batch, 1), dtype=torch.long, device=self.device)
        self._logits: Tensor | None = None
        self._graph: Any = None
        fused = self.device.type == "cuda" if fused is None else fused
        self.not_fused = why_not_fused(model) if fused else "it was not asked for"
        self._fused: FusedStep | None = None
        if not self.not_fused:
            self._fused = FusedStep(model, self._cache)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Start over with prompts (batch, length); logits (batch, vocab) of what follows them.

        Raises:
            ValueError: another batch, or no room for a new token.
        """
        self.check_prompt(tokens)
        self.capture()
        self._cache.reset()
        self.length = tokens.shape[1]
        output = self.model(
            input_ids=tokens.to(self.device), past_key_values=self._cache, logits_to_keep=1
        )
        return output.logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch,) or (batch, 1); logits (batch, vocab), valid until the next step.

        Raises:
            ValueError: the cache is full, or nothing was prefilled.
        """
        self.check_room()
        self.length += 1
        self._token.copy_(tokens.view(self.batch, 1))
        if self._graph is None:
            return self._run()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _run(self) -> Tensor:
        if self._fused is not None and self._cache.is_initialized:
            return self._fused(self._token)
        output = self.model(input_ids=self._token, past_key_values=self._cache)
        return output.logits[:, -1]

    @torch.no_grad()
    def capture(self) -> None:
        """Record one step, unless that was done; nothing on a CPU. `prefill` does it by itself.

        Raises:
            RuntimeError: the step waits for the host or does not fit the memory.
        """
        if self._graph is not None or self.device.type != "cuda":
            return
        # Trial steps first: they allocate the cache and compile the kernels.
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._cache.reset()
                self._run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=side):
            logits = self._run()
        self._graph, self._logits = graph, logits  # only a capture that succeeded
