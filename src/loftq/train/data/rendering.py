"""From a chat to its text, and the parts of it that are answers of the assistant.

A template is a program: nothing says which of its output an answer is, except where its author
marked it (`{% generation %}`). Otherwise an answer is found between two facts about the template:
it starts where the rendering of everything before it, with the prompt for an answer, ends; and it
ends with the mark that the template puts after an answer. Both are checked against the text of the
whole chat, since a template may write a turn differently once others follow (reasoning is dropped):
such a turn is not what the model would have been asked for, and it is not trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from loftq.train.data.prefix import shared_length
from loftq.train.data.problems import DataError, Unusable
from loftq.train.data.samples import ASSISTANT, Chat, Message
from loftq.train.data.templates import require_template

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "zyzzyva"
"""An answer that no template holds already."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what was thought before the answer."""

THOUGHT_END = "</think>"
"""Ends a thought that stands in the content; templates put it elsewhere or leave it out."""

Span = tuple[int, int]
"""Of characters: first, one after the last."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text."""

    text: str
    answers: tuple[Span, ...]
    """Parts that are trained, in order: each an answer with its mark of the end."""
    rewritten: int = 0
    """Answers that the template writes differently once other turns follow: not trained."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and what was found out about it."""

    tokenizer: Any
    ending: str
    """What follows an answer, up to white space: `<|im_end|>`. Empty if nothing known does."""
    header: str
    """What precedes an answer, where the template has no prompt for one."""
    marked: bool = False
    """Whether the template marks its answers by itself."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Probe a tokenizer's template with one exchange; a template may refuse that one.

        Raises:
            DataError: the tokenizer has none, or one that does not write what is said.
        """
        require_template(tokenizer)
        source = tokenizer.get_chat_template()
        template = cls(tokenizer, "", "", marked=bool(GENERATION.search(source)))
        asked: list[Message] = [{"role": "user", "content": "a"}]
        answered = [*asked, {"role": ASSISTANT, "content": PROBE}]
        try:
            prompt, silent = template.render(asked, prompt=True), template.render(asked)
            last = template.render(answered)
            inner = template.render([*answered, *asked])
        except Unusable:
            return template
        if PROBE not in last:
            raise DataError(
                "the chat template does not write the text of messages (those of models that see "
                "images often take parts instead). Give one for text with chat_template=FILE."
            )
        before, _, after = last.rpartition(PROBE)
        ending = _ending(tokenizer, inner.rpartition(PROBE)[2], after.strip())
        unprompted = prompt == silent and before.startswith(prompt)
        return replace(template, ending=ending, header=before[len(prompt) :] * unprompted)

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: Any = ()) -> str:
        """The text of messages, with the prompt for an answer if asked.

        Raises:
            Unusable: the template refuses them.
        """
        with _refusals():
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                tools=list(tools) or None,
            )

    def answers_of(self, chat: Chat) -> Rendered:
        """The text of a chat and where its answers stand.

        Raises:
            Unusable: the template refuses the chat, or rewrites all of its answers.
        """
        if self.marked:
            return self._marked_answers(chat)
        text = self.render(chat.messages, tools=chat.tools)
        turns = range(chat.first, len(chat.messages))
        asked = [n for n in turns if chat.messages[n]["role"] == ASSISTANT]
        spans = [self._answer(chat, n, text) for n in asked]
        found = tuple(span for span in spans if span is not None)
        if not found:
            raise Unusable("the chat template rewrites every answer: none is left to train on.")
        return Rendered(text, found, len(spans) - len(found))

    def _marked_answers(self, chat: Chat) -> Rendered:
        """The answers that the template marks, each with its end, which some leave unmarked."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            texts, spans = render_jinja_template(
                conversations=[list(chat.messages)],
                tools=list(chat.tools) or None,
                chat_template=self.tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        before = sum(message["role"] == ASSISTANT for message in chat.messages[: chat.first])
        found = [(start, self._with_ending(texts[0], end)) for start, end in spans[0][before:]]
        found = [(start, end) for start, end in found if end > start]
        if not found:
            raise Unusable("the chat template marks none of its answers with {% generation %}.")
        return Rendered(texts[0], tuple(found))

    def _with_ending(self, text: str, end: int) -> int:
        rest = text[end:]
        space = len(rest) - len(rest.lstrip())
        if self.ending and rest.startswith(self.ending, space):
            return end + space + len(self.ending)
        return self._trimmed(text, end)

    def _answer(self, chat: Chat, turn: int, text: str) -> Span | None:
        """Where the answer of a turn stands in the whole text; None if it is written otherwise."""
        start = self._start(chat, turn, text)
        if start is None:
            return None
        end = self._end(chat, turn, text, start)
        if end is None or end <= start:
            return None
        message = chat.messages[turn]
        said = [message["content"].rpartition(THOUGHT_END)[2], *map(message.get, REASONING)]
        dropped = any(isinstance(p, str) and p.strip() not in text[start:end] for p in said)
        return None if dropped else (start, end)

    def _start(self, chat: Chat, turn: int, text: str) -> int | None:
        before = chat.messages[:turn]
        asked = self.render(before, prompt=True, tools=chat.tools) if before else ""
        if text.startswith(asked):
            start = len(asked)
            return start + len(self.header) * text.startswith(self.header, start)
        # The prompt for an answer may hold more than what stays of it, such as "<think>".
        base = self.render(before, tools=chat.tools)
        return shared_length(asked, text) if text.startswith(base) else None

    def _end(self, chat: Chat, turn: int, text: str, start: int) -> int | None:
        if turn == len(chat.messages) - 1:
            return self._trimmed(text, len(text))
        content = chat.messages[turn]["content"].strip()
        if self.ending and content and not chat.messages[turn].get("tool_calls"):
            end = self._verbatim_end(text, content, start)
            if end is not None:
                return end
        so_far = self.render(chat.messages[: turn + 1], tools=chat.tools)
        return self._trimmed(text, len(so_far)) if text.startswith(so_far) else None

    def _verbatim_end(self, text: str, content: str, start: int) -> int | None:
        """End of the first place from `start` where the content and the mark of the end stand.

        Before it only the template's own additions may stand, not the end of another turn.
        """
        at = text.find(content, start)
        while at >= 0 and self.ending not in text[start:at]:
            end = at + len(content)
            while text[end : end + 1].isspace():
                end += 1
            if text.startswith(self.ending, end):
                return end + len(self.ending)
            at = text.find(content, at + 1)
        return None

    def _trimmed(self, text: str, end: int) -> int:
        """Without white space after the mark of the end: nobody generates past that mark."""
        return len(text[:end].rstrip()) if self.ending else end


def _ending(tokenizer: Any, inner: str, last: str) -> str:
    """The mark of the end, from what follows an inner answer and what follows the last one.

    Templates may end the last answer in another way; then the mark is all up to the first special
    token: of "<|end|>\\n<|user|>..." and "<|end|>\\n</s>" it is "<|end|>".
    """
    if inner.lstrip().startswith(last):
        return last
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    marks = [inner.find(token) + len(token) for token in special if token in inner]
    return inner[: min(marks)].strip() if marks else ""


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template raises, as a reason not to use the row."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise Unusable(f"the chat template refuses it: {error}") from error
