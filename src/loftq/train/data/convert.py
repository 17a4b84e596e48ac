"""From the columns of a row to a sample, one function for each format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loftq.train.data.prefix import shared_length
from loftq.train.data.problems import Unusable, kind_of_value
from loftq.train.data.samples import (
    ASSISTANT,
    CONTINUES,
    ROLES,
    Chat,
    Completion,
    Document,
    Message,
    Preference,
)

TURN_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a list of turns, under either way to write them."""

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""ShareGPT's "from" as a role."""

Values = Mapping[str, Any]


def messages(row: Values) -> Chat:
    """{"messages": [{"role", "content"}, ...], "tools": [...]}."""
    return _chat([_message(turn, n) for n, turn in enumerate(_turns(row), 1)], row)


def sharegpt(row: Values) -> Chat:
    """{"conversations": [{"from", "value"}, ...], "system": "..."}."""
    found = [_from_speaker(turn, n) for n, turn in enumerate(_turns(row), 1)]
    if row.get("system"):
        found.insert(0, {"role": "system", "content": _string(row, "system")})
    return _chat(found, row)


def alpaca(row: Values) -> Chat:
    """{"instruction", "input", "output"}: one exchange, the input below the instruction."""
    question = _string(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _string(row, "input")
    return _chat([_said("user", question), _said(ASSISTANT, _string(row, "output"))], row)


def prompt_completion(row: Values) -> Completion | Chat:
    """{"prompt", "completion"}: two strings as they are, or two lists of messages."""
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return Completion(_string(row, "prompt"), _string(row, "completion"))
    prompt, completion = _listed(row, "prompt"), _listed(row, "completion")
    return _chat(prompt + completion, row, first=len(prompt))


def text(row: Values) -> Document:
    """{"text"}, or a block of a text file."""
    return Document(_string(row, "text"), ends=not row.get(CONTINUES, False))


def preference(row: Values) -> Preference:
    """{"prompt", "chosen", "rejected"}; without a prompt, what both answers begin with."""
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        found = _text_preference(row)
    else:
        found = _chat_preference(row)
    if found.chosen == found.rejected:
        raise Unusable('"chosen" and "rejected" are the same.')
    return found


def _text_preference(row: Values) -> Preference:
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    if "prompt" in row:
        return Preference(_string(row, "prompt"), chosen, rejected)
    shared = chosen[: shared_length(chosen, rejected)]
    # Answers may begin with the same letters: the prompt ends with the last whole word before.
    size = len(shared) - len(shared.split(" ")[-1].split("\n")[-1])
    if not shared[:size].strip():
        raise Unusable('no "prompt", and "chosen" and "rejected" begin with no words in common.')
    if not (chosen[size:].strip() and rejected[size:].strip()):
        raise Unusable('no "prompt", and one answer is the beginning of the other.')
    return Preference(shared[:size], chosen[size:], rejected[size:])


def _chat_preference(row: Values) -> Preference:
    chosen, rejected = _listed(row, "chosen"), _listed(row, "rejected")
    shared = shared_length(chosen, rejected)
    if shared:
        # The prompt column, where there is one, repeats what both answers begin with.
        prompt = chosen[:shared]
    elif isinstance(row.get("prompt"), str):
        prompt = [_said("user", _string(row, "prompt"))]
    else:
        prompt = _listed(row, "prompt") if "prompt" in row else []
    if not prompt:
        raise Unusable('no "prompt", and "chosen" and "rejected" have no first message in common.')
    chosen, rejected = chosen[shared:], rejected[shared:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == ASSISTANT for message in answer):
            raise Unusable(f'"{name}" has no turn of the assistant after the prompt.')
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected))


def _turns(row: Values) -> Sequence[Any]:
    column = next(name for name in TURN_COLUMNS if isinstance(row.get(name), list))
    return row[column]


def _listed(row: Values, column: str) -> list[Message]:
    if not isinstance(row[column], list):
        raise Unusable(f'"{column}" is {kind_of_value(row[column])}; expected a list of messages.')
    return [_message(turn, n, column) for n, turn in enumerate(row[column], 1)]


def _chat(found: list[Message], row: Values, *, first: int = 0) -> Chat:
    """Checked as a whole; an empty system message is the same as none."""
    prompt, rest = (
        [m for m in part if m["content"] or m["role"] != "system"]
        for part in (found[:first], found[first:])
    )
    if not any(message["role"] == ASSISTANT for message in rest):
        raise Unusable("has no turn of the assistant: there is nothing to learn.")
    return Chat((*prompt, *rest), _tools(row), len(prompt))


def _message(turn: Any, number: int, column: str = "messages") -> Message:
    """A turn with a known role and text; keys that hold nothing are left out."""
    where = f"turn {number} of {column}"
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise Unusable(
            f'{where} is {kind_of_value(turn)}; expected an object with "role" and "content".'
        )
    if turn["role"] not in ROLES:
        raise Unusable(
            f"{where} has the role {turn['role']!r}; expected one of {', '.join(ROLES)}."
        )
    message = {key: value for key, value in turn.items() if value is not None}
    message["content"] = _content(turn.get("content"), where)
    silent = message.get("tool_calls") or message["role"] == "system"
    if not message["content"].strip() and not silent:
        raise Unusable(f"{where} ({turn['role']}) has no content.")
    return message


def _content(value: Any, where: str) -> str:
    """Text; a list of text parts is joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else kind_of_value(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Unusable(f"{where} holds {kind}; only text can be trained on.")
    return "".join(part["text"] for part in parts)


def _from_speaker(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
        raise Unusable(f'turn {number} is {kind_of_value(turn)}; expected {{"from", "value"}}.')
    role = SPEAKERS.get(str(turn["from"]).lower())
    if role is None:
        known = ", ".join(SPEAKERS)
        raise Unusable(f"turn {number} is from {turn['from']!r}; expected one of {known}.")
    return _message({"role": role, "content": turn["value"]}, number, "conversations")


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _tools(row: Values) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas, which some data sets hold as a JSON string."""
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Unusable(f'"tools" is not JSON ({error}).') from error
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise Unusable('"tools" is not a list of JSON schemas.')
    return tuple(tools)


def _string(row: Values, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise Unusable(f'"{column}" is {kind_of_value(value)}; expected text.')
    if not value.strip():
        raise Unusable(f'"{column}" is empty.')
    return value
