"""The demo's text: short essays written for this project, in two parts."""

from __future__ import annotations

from importlib.resources import files

from torch import Tensor

TEXT_FILE = "demo_text.txt"
PARTS = ("= Training part =", "= Evaluation part =")


def demo_text() -> tuple[str, str]:
    """(training part, evaluation part). No essay is in both."""
    whole = files("loftq.lab").joinpath(TEXT_FILE).read_text(encoding="utf-8")
    training, evaluation = whole.removeprefix(PARTS[0]).split(PARTS[1])
    return training.strip(), evaluation.strip()


def windows(ids: Tensor, context: int) -> Tensor:
    """Tokens (n,) cut into whole windows (n // context, context).

    Raises:
        ValueError: fewer tokens than one window.
    """
    count = len(ids) // context
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {context}.")
    return ids[: count * context].view(count, context)
