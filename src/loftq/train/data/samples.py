"""What a row means, whatever format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""role, content, and what else the chat template reads (tool_calls, reasoning_content, name)."""

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")


CONTINUES = "\0continues"
"""Column of a text file's block that the next block goes on from; no data can have it by chance."""


@dataclass(frozen=True)
class Chat:
    """A conversation; the assistant's turns from `first` on are answers to learn."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools, for templates that show them."""
    first: int = 0
    """Index of the first message that may be trained."""


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation, as written: no template, no separator."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """Running text."""

    text: str
    ends: bool = True
    """Whether the document ends here; a block of a long file does not."""


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer: strings, or lists of messages, all three alike."""

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]


Sample: TypeAlias = Chat | Completion | Document | Preference
