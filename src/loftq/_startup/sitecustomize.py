"""Imported by Python itself at its start, where `python -m loftq.run` has put this folder first.

It imports loftq, which is light and leaves a hook for transformers, and then runs the sitecustomize
that would have been found without this folder. Standard library only.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_next() -> None:
    """Run the sitecustomize that this one hides, if there is one."""
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


# Another interpreter may lack loftq. A packed folder then does not load, and transformers says so.
with contextlib.suppress(ImportError):
    import loftq  # noqa: F401

if __name__ == "sitecustomize":
    run_next()
