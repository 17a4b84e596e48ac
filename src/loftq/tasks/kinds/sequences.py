"""What the kinds share that learn text: rows as prompt and completion, their losses, answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from loftq.tasks.kinds.batches import in_batches, on_device, pad_inputs, scoring
from loftq.train.padding import IGNORED, pad
from loftq.train.samples import answer


def joined(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, list[int]]:
    """A feature of a decoder: the completion is learnt, the prompt is read."""
    return {
        "input_ids": [*prompt, *completion],
        "labels": [IGNORED] * len(prompt) + list(completion),
    }


def completion_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that follows another, and the one that ends it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return list(ids)
    return [*ids, tokenizer.eos_token_id]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that begins a sequence, without a mark of its end."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    ends = ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1
    return ids[:-1] if ends else ids


def collate_labelled(features: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """A batch of features with sequences of labels; a decoder's are on the side of its inputs."""
    same = all(len(f["labels"]) == len(f["input_ids"]) for f in features)
    left = same and tokenizer.padding_side == "left"
    labels = pad([feature["labels"] for feature in features], IGNORED, left=left)
    return {**pad_inputs(features, tokenizer), "labels": labels}


def label_losses(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    batch_size: int,
    on_batch: Callable[[int, int], object],
) -> list[tuple[float, int]]:
    """(nats, tokens) of the labels of each feature, teacher-forced; sums, not means.

    Args:
        model: a causal or an encoder-decoder model.
        features: input_ids and labels.
        tokenizer: of the model.
        batch_size: features at a time.
        on_batch: see `in_batches`.
    """
    shift = 0 if getattr(model.config, "is_encoder_decoder", False) else 1

    def run(batch: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
        inputs = on_device(collate_labelled(batch, tokenizer), model)
        labels = inputs["labels"][:, shift:]
        logits = model(**inputs).logits
        logits = logits[:, : logits.shape[1] - shift].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        sums, counts = losses.double().sum(1), (labels != IGNORED).sum(1)
        return list(zip(sums.tolist(), counts.tolist(), strict=True))

    with scoring(model):
        return in_batches(features, batch_size, run, on_batch)


def generate(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[Sequence[int]],
    *,
    tokens: int,
    beams: int,
    batch_size: int,
    on_batch: Callable[[int, int], object],
) -> list[str]:
    """Greedy or beam-searched answers, special tokens left out.

    Args:
        model: a causal or an encoder-decoder model.
        tokenizer: of the model.
        inputs: token ids of each prompt, or of each source.
        tokens: most tokens of an answer.
        beams: 1 = greedy.
        batch_size: prompts at a time.
        on_batch: see `in_batches`.
    """
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def run(batch: Sequence[Mapping[str, Any]]) -> list[str]:
        prompts = [feature["input_ids"] for feature in batch]
        return answer(model, tokenizer, prompts, tokens=tokens, stop=stop, beams=beams)

    with scoring(model):
        return in_batches([{"input_ids": ids} for ids in inputs], batch_size, run, on_batch)
