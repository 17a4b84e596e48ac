"""A tiny random model that can chat, and data in its words, for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import zoo

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ROLES = ("user", "assistant", "system")
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def write_model(folder: Path, name: str = "llama") -> Path:
    """A model of the zoo with a tokenizer of whole words, within its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    zoo.save(zoo.build(name), folder)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *ROLES, "<unk>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, rows: int = 24) -> Path:
    """Questions of two numbers, answered by those that follow."""
    pick = random.Random(0)
    lines = []
    for _ in range(rows):
        first, length = pick.randrange(6), pick.randrange(1, 5)
        answer = " ".join(WORDS[first + 2 : first + 2 + length])
        turns = [("user", " ".join(WORDS[first : first + 2])), ("assistant", answer)]
        lines.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return _write(path, lines)


def write_preferences(path: Path, rows: int = 20) -> Path:
    """The number that follows, and one that does not."""
    pick = random.Random(1)
    lines = []
    for _ in range(rows):
        first = pick.randrange(7)
        prompt = " ".join(WORDS[first : first + 2])
        wrong = WORDS[(first + 5) % 10]
        lines.append({"prompt": prompt, "chosen": f" {WORDS[first + 2]}", "rejected": f" {wrong}"})
    return _write(path, lines)


def write_texts(path: Path, rows: int = 24) -> Path:
    """Short documents of three to eight numbers."""
    pick = random.Random(2)
    lines = []
    for _ in range(rows):
        first, length = pick.randrange(10), pick.randrange(3, 9)
        lines.append({"text": " ".join(WORDS[(first + i) % 10] for i in range(length))})
    return _write(path, lines)


def _write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
