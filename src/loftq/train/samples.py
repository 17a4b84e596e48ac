"""Held-out prompts, answered by the model as it is."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from loftq.integrations.run_folder import RunFolder
from loftq.train.padding import pad

CLOSING = 3
"""A turn ends within so many tokens: its end mark, and perhaps a line break."""


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    stop: Sequence[int],
    beams: int = 1,
) -> list[str]:
    """Greedy or beam-searched answers to all prompts, in one batch.

    Args:
        model: a causal or an encoder-decoder model, on any device; its mode is kept.
        tokenizer: its tokenizer, with a pad token.
        prompts: token ids of each prompt.
        tokens: the most tokens of an answer; fewer where the context of a causal model ends.
        stop: ids that end an answer.
        beams: 1 = greedy.

    Returns:
        One text per prompt, special tokens left out.
    """
    if not prompts:
        return []
    left = not getattr(model.config, "is_encoder_decoder", False)
    ids = pad(prompts, tokenizer.pad_token_id, left=left)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=left)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=min(tokens, _room(model, ids.shape[1])) if left else tokens,
            num_beams=beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=list(stop) or None,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(training)
    answers = found[:, ids.shape[1] :] if left else found
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def _room(model: Any, length: int) -> int:
    """Tokens that fit behind a prompt, at least one: a table of positions has no row beyond."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max(1, positions - length) if isinstance(positions, int) else sys.maxsize


def stop_tokens(tokenizer: Any, rows: Iterable[Sequence[int]]) -> list[int]:
    """Ids that end an answer: the tokenizer's own, and the mark with which trained answers end.

    A chat template may end a turn with another token than the tokenizer's (<|im_end|> beside
    <|endoftext|>); without it a model that was taught to stop would be heard to go on.

    Args:
        tokenizer: gives eos_token_id and the special ids.
        rows: token ids of some training rows, up to the last token that is trained.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = Counter(
        next((token for token in reversed(row[-CLOSING:]) if token in special), None)
        for row in rows
    )
    stop = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    likely = ends.most_common(1)[0][0] if ends else None
    return stop if likely is None or likely in stop else [*stop, int(likely)]


def earlier_samples(
    run: RunFolder, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """samples.json of an earlier sitting if it answers these prompts, else None."""
    try:
        found = json.loads(run.samples.read_text(encoding="utf-8"))
        asked = [{key: row[key] for key in ("prompt", "reference")} for row in found]
        answered = all(isinstance(row["before"], str) for row in found)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if answered and asked == list(rows) else None
