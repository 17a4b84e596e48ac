"""A tokenizer of whole words with a chat template, and one of bytes, for the zoo's models."""

from __future__ import annotations

from typing import Any

import zoo

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TURN_END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


def word_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A word for every id of the zoo's models; <eos> is 2, <|im_end|> is 4."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<eos>", "<|im_start|>", TURN_END]
    names = ["<unk>", *WORDS, "user", "assistant", "system"]
    listed = ["zero", "none", *special, *names]
    listed += [f"word{i}" for i in range(len(listed), zoo.VOCAB)]
    vocabulary = {word: i for i, word in enumerate(listed)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[AddedToken(x, special=True) for x in special[1:]],
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer() -> Any:
    """One token for each byte: a character beyond ASCII takes several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    bytes_ = Tokenizer(model)
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_)
