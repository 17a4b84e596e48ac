"""How many tokens of a row a model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loftq.tasks.base import TaskError

if TYPE_CHECKING:
    from loftq.tasks.base import Task

UNLIMITED = 10**9
"""A tokenizer says a length over this when it does not know its model's context."""
OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text")
"""Models whose first position is padding_idx + 1: so many rows of their table are unused."""
DEFAULT_LENGTH = 512


def model_length(tokenizer: Any, config: Any) -> int | None:
    """Most tokens that the model reads at once, or None where nothing limits it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = []
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        unused = (text.pad_token_id or 0) + 1 if text.model_type in OFFSET else 0
        limits.append(positions - unused)
    if tokenizer.model_max_length < UNLIMITED:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=None)


def reading_length(task: Task, tokenizer: Any, config: Any, asked: int | None) -> int:
    """Tokens of a feature: those asked for, else the task's default, at most what the model reads.

    Raises:
        TaskError: more were asked for than the model reads.
    """
    limit = model_length(tokenizer, config)
    if asked is not None and limit is not None and asked > limit:
        raise TaskError(
            f"{task.name}: max_length={asked}, and the model reads {limit} tokens at once. Choose "
            "at most that."
        )
    chosen = asked or int(task.defaults.get("max_length", DEFAULT_LENGTH))
    return chosen if limit is None else min(chosen, limit)
