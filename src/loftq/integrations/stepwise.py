"""An answer step by step: every token is one CUDA graph, or on a CPU one call of the library.

transformers' `generate` runs each operator of each token from Python, which takes many times as
long as they compute. The choice of a token is the same as there: its own logits processors, in
its order, and its way to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.integrations.cpu_decoder import CpuDecoder, why_no_cpu_decoder
from loftq.integrations.decode import Decoder, GraphDecoder
from loftq.integrations.families import without_peft
from loftq.integrations.inference import prepare_for_inference

if TYPE_CHECKING:
    from transformers.generation import BaseStreamer

    from loftq.integrations.generate import Sampling

ROOM = 1024
"""The cache is made for a multiple of so many tokens, so that later answers find room in it."""


def why_not_stepwise(model: Any) -> str:
    """Reason that `generate` has to decode this model token by token, or ""."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return "it lies on several devices"
    kind = next(iter(devices)).type
    if kind == "cpu":
        return why_no_cpu_decoder(model)
    if kind != "cuda":
        return "graphs of steps are a CUDA feature"
    base = without_peft(model)
    if not getattr(base, "_can_compile_fullgraph", False):
        return f"transformers cannot run {type(base).__name__} with a static cache"
    return ""


def decoder_for(
    model: Any, tokens: int, *, before: Decoder | None = None, limit: int | None = None
) -> Decoder:
    """A decoder with room for `tokens`, prompt and answer: the one from before if it has it.

    The adapters are folded into the packed layers (`prepare_for_inference`).

    Args:
        model: one that `why_not_stepwise` has nothing against.
        tokens: of prompt and answer together.
        before: the decoder of an earlier answer of this model.
        limit: the most tokens that the model can hold; None = unknown.

    Raises:
        RuntimeError: the step cannot be captured, or the library cannot take it.
    """
    if before is not None and before.model is model and before.max_length >= tokens:
        return before
    rounded = -(-tokens // ROOM) * ROOM
    length = max(tokens, rounded if limit is None else min(rounded, limit))
    prepare_for_inference(model)
    if next(model.parameters()).device.type == "cpu":
        return CpuDecoder(model, max_length=length)
    decoder = GraphDecoder(model, max_length=length)
    decoder.capture()
    return decoder


@torch.no_grad()
def continue_prompt(
    decoder: Decoder,
    prompt: Tensor,
    sampling: Sampling,
    *,
    stops: Sequence[int],
    streamer: BaseStreamer,
) -> None:
    """Tell `streamer` the prompt and each new token, until one of `stops` or the limit.

    Args:
        decoder: with room for the prompt and `sampling.max_new_tokens`.
        prompt: (1, length) token ids.
        sampling: how tokens are chosen; draws come from the global generator of the device.
        stops: tokens after which the answer is over.
        streamer: gets what `generate` would tell it.
    """
    streamer.put(prompt.cpu())
    chosen, processors = prompt, _processors(sampling)
    logits = decoder.prefill(prompt)
    for left in reversed(range(sampling.max_new_tokens)):
        token = _choose(processors(chosen, logits.float()), draw=sampling.temperature > 0)
        chosen = torch.cat([chosen, token], dim=1)
        streamer.put(token.flatten().cpu())
        if not left or int(token) in stops:
            break
        logits = decoder.step(token)
    streamer.end()


def _choose(scores: Tensor, *, draw: bool) -> Tensor:
    if draw:
        return torch.multinomial(scores.softmax(-1), 1)
    return scores.argmax(-1, keepdim=True)


def _processors(sampling: Sampling) -> Any:
    """transformers' own, in the order in which `generate` applies them."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature > 0 and sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found
