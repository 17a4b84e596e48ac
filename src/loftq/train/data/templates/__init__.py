"""Chat templates for tokenizers that have none, one .jinja file each.

They mark no `{% generation %}`, so that every engine which reads a tokenizer's template can read
them. A new one is a file here and a row of BUILT_IN.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from loftq.train.data.problems import DataError

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "turns": (),
    "alpaca": (),
}
"""By name: the tokens that the tokenizer must have for it."""


def use_template(tokenizer: Any, name: str | None) -> str | None:
    """Give a tokenizer the chat template that was asked for, in place; None leaves it its own.

    Returns:
        A note that says which one, or None.

    Raises:
        DataError: no such template, or one made of tokens that the tokenizer lacks.
    """
    if name is None:
        return None
    text = _built_in(tokenizer, name) if name in BUILT_IN else _from_file(name)
    replaced = " instead of the tokenizer's own" if tokenizer.chat_template else ""
    tokenizer.chat_template = text
    return f"chat template: {name}{replaced}"


def require_template(tokenizer: Any) -> None:
    """Raises DataError, naming the option, if a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            "the data holds chats, but the tokenizer has no chat template (a base model). Set "
            f"chat_template={'|'.join(fitting(tokenizer))}, or a .jinja file of your own."
        )


def fitting(tokenizer: Any) -> list[str]:
    """Names of the built-in templates whose tokens a tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return [
        name for name, needed in BUILT_IN.items() if all(token in vocabulary for token in needed)
    ]


def _built_in(tokenizer: Any, name: str) -> str:
    if name not in fitting(tokenizer):
        raise DataError(
            f"chat_template={name}: the tokenizer lacks its tokens {' '.join(BUILT_IN[name])}, and "
            f"the vocabulary is not resized. Choose {' or '.join(fitting(tokenizer))}."
        )
    text = files(__package__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    start = tokenizer("a", verbose=False)["input_ids"][:1]
    starts = tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id]
    return "{{- bos_token -}}\n" + text if starts else text


def _from_file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"chat_template={name}: neither built in ({', '.join(BUILT_IN)}) nor a file. Give one "
            "of the names, or the path of a .jinja file."
        )
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise DataError(f"chat_template={name}: the file is empty.")
    _check_syntax(name, text)
    return text


def _check_syntax(name: str, text: str) -> None:
    """A mistake in a template is one error, not one for each row."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)
    except TemplateSyntaxError as error:
        raise DataError(f"{name}: not a template (line {error.lineno}: {error}).") from error
