"""What was said so far, and the tokens it becomes.

With a chat template the whole conversation is rendered for each answer, and the oldest turns give
way when it outgrows the model. Without one, each prompt is a text of its own that is continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RESERVED = 4
"""At most one part in so many of the context is kept free for the answer."""


class ContextError(ValueError):
    """One prompt alone is longer than what the model was made for."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt."""

    ids: list[int]
    forgotten: int
    """Turns (a question with its answer) that had to give way for it."""


class Conversation:
    """The turns between a user and a model.

    Args:
        tokenizer: of the model; its chat template, if any, decides the form.
        context: tokens of prompt and answer together; None = no limit known.
        system: instruction at the head of a conversation.

    Raises:
        ValueError: a system instruction where there is no chat template to hold it.
    """

    def __init__(
        self, tokenizer: Any, *, context: int | None = None, system: str | None = None
    ) -> None:
        self._tokenizer, self._context, self._system = tokenizer, context, system
        self.turns: list[tuple[str, str]] = []
        """(user, assistant), the oldest first."""
        if system is not None and not self.has_template:
            raise ValueError(
                "system=...: this tokenizer has no chat template, so there is no place for an "
                "instruction. Leave system out and put it into the text."
            )

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer knows how a conversation is written."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def prompt(self, text: str, *, room: int) -> Prompt:
        """The tokens of the conversation with `text` as the next question; forgets what must go.

        Args:
            text: what the user says.
            room: tokens that the answer may take; of it, at most a quarter of the context is kept
                free at the cost of old turns.

        Raises:
            ContextError: `text` alone fills the context.
            ValueError: the chat template refuses the conversation.
        """
        forgotten, before = 0, list(self.turns)
        ids = self._render(text)
        if self._context is None:
            return Prompt(ids, forgotten)
        kept_free = min(room, self._context // RESERVED)
        while self.turns and len(ids) + kept_free > self._context:
            del self.turns[0]
            forgotten += 1
            ids = self._render(text)
        if len(ids) >= self._context:
            self.turns[:] = before  # nothing was answered: nothing is forgotten
            raise ContextError(
                f"the prompt has {len(ids):,} tokens, the model was made for {self._context:,}, "
                "answer included. Shorten it."
            )
        return Prompt(ids, forgotten)

    def add(self, user: str, assistant: str) -> None:
        """Remember a turn; a model without chat template remembers none."""
        if self.has_template:
            self.turns.append((user, assistant))

    def reset(self) -> None:
        """Forget all turns; the system instruction stays."""
        self.turns.clear()

    def messages(self, text: str) -> list[dict[str, str]]:
        """The conversation in the form that chat templates take."""
        found = [] if self._system is None else [{"role": "system", "content": self._system}]
        for user, assistant in self.turns:
            found.append({"role": "user", "content": user})
            found.append({"role": "assistant", "content": assistant})
        return [*found, {"role": "user", "content": text}]

    def _render(self, text: str) -> list[int]:
        if not self.has_template:
            return self._continued(text)
        from jinja2 import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(
                self.messages(text), add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            hint = " Leave system=... out." if self._system is not None else ""
            raise ValueError(
                f"the model's chat template refuses this conversation ({error}).{hint}"
            ) from error
        return list(rendered["input_ids"])

    def _continued(self, text: str) -> list[int]:
        """The text's tokens, open at the end: some tokenizers close every text by themselves."""
        ids = list(self._tokenizer(text)["input_ids"])
        while ids and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()
        return ids
