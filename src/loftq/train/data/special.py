"""The special tokens that training needs of a tokenizer; its vocabulary stays as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loftq.train.data.problems import DataError

PAD_WORDS = ("pad", "padding", "reserved", "unused", "unk")
"""What the name of a token says that can stand in as padding, best first."""


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that begin, end and pad."""

    bos: int | None
    """Token that the tokenizer starts each text with; None if it starts with none."""
    eos: int
    pad: int
    every: frozenset[int]
    """All special tokens."""
    notes: tuple[str, ...] = ()
    """What had to be chosen."""


def special_tokens(tokenizer: Any) -> Special:
    """The special tokens of a tokenizer; one without a padding token gets one, in place.

    The padding token is one that the vocabulary already has: by its name, else the end-of-text
    token. Padding is masked in loss and attention, so that the choice changes no result.

    Raises:
        DataError: no end-of-text token, or a tokenizer that cannot say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__}: cannot say where in a text its tokens stand, which the "
            "loss mask needs. Give the model's folder a tokenizer.json (a fast tokenizer)."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token (eos_token), so that a model could not learn "
            'to stop. Name the token it has for this as "eos_token" in tokenizer_config.json.'
        )
    notes = () if tokenizer.pad_token_id is not None else (_choose_pad(tokenizer),)
    start = tokenizer("a", verbose=False)["input_ids"][:1]
    bos = tokenizer.bos_token_id
    added = tokenizer.added_tokens_decoder.items()
    return Special(
        bos=bos if bos is not None and start == [bos] else None,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        every=frozenset([*tokenizer.all_special_ids, *(i for i, t in added if t.special)]),
        notes=notes,
    )


def _choose_pad(tokenizer: Any) -> str:
    known = [token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    chosen = _by_name([token.content for token in known], tokenizer) or tokenizer.eos_token
    tokenizer.pad_token = chosen
    return (
        f"the tokenizer has no padding token: {chosen} (id {tokenizer.pad_token_id}) stands in, "
        "the vocabulary stays as it is"
    )


def _by_name(tokens: Iterable[str], tokenizer: Any) -> str | None:
    """The token whose name says that nothing else needs it."""
    taken = {tokenizer.bos_token, tokenizer.eos_token}
    free = [token for token in tokens if token not in taken]
    for word in PAD_WORDS:
        found = next((token for token in free if word in token.lower()), None)
        if found is not None:
            return found
    return None
