"""Module names and patterns as users write them: one meaning for targets, skip and formats.

A pattern selects a module when it matches the path, or the path of a module that holds it, from the
start or after any dot: `q_proj`, `self_attn`, `layers.0`, `*.down_proj` and `model.layers.[01].*`
all do what they seem to. Case counts; `*` crosses dots.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(pattern: str, module: str) -> bool:
    """Whether `pattern` selects the module at path `module`."""
    parts = module.split(".")
    holders = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}") for path in holders)


def unmatched(patterns: Iterable[str], modules: Sequence[str], *, where: str) -> str | None:
    """The complaint about the patterns that select none of `modules`, or None when all do.

    Args:
        patterns: as the user wrote them.
        modules: paths that exist.
        where: the option that holds the patterns, for the message.
    """
    useless = [p for p in patterns if not any(matches(p, module) for module in modules)]
    if not useless:
        return None
    return " ".join(f"{where}: {p!r} matches no module. {_nearest(p, modules)}" for p in useless)


def _nearest(pattern: str, modules: Sequence[str]) -> str:
    parts = [module.split(".") for module in modules]
    last = dict.fromkeys(names[-1] for names in parts)
    inner = dict.fromkeys(name for names in parts for name in names[:-1] if not name.isdigit())
    wanted = pattern.strip("*.").split(".")[-1] or pattern
    known = [*last, *(name for name in inner if name not in last)]
    for query, pool in ((wanted, known), (pattern, list(modules))):
        near = difflib.get_close_matches(query, pool, n=1, cutoff=0.5)
        if near:
            return f"Did you mean {near[0]!r}?"
    return f"Names here: {', '.join(list(last)[:12])}."
