"""`python -m loftq.run TOOL ...`: run a tool that does not import loftq, with loftq imported.

TOOL is a script, `-m MODULE`, or the name of an installed command; all further words are its own.
It runs in this process, as if it had been started by itself. Interpreters that it starts in turn,
such as the workers of a launcher, import loftq too: they find `_startup` first in PYTHONPATH.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

USAGE = """\
usage: python -m loftq.run SCRIPT.py [ARGUMENT ...]
       python -m loftq.run -m MODULE [ARGUMENT ...]
       python -m loftq.run COMMAND [ARGUMENT ...]

Runs a tool that does not import loftq so that transformers loads packed folders in it, and in the
Python processes that it starts. COMMAND is an installed one, such as trl, accelerate or lm_eval."""
MISTAKE = 2
STARTUP = Path(__file__).resolve().parent / "_startup"


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool. Whatever it raises or exits with comes through.

    Raises:
        SystemExit: with 2, no tool is named or there is no such tool.
    """
    given = list(sys.argv[1:] if words is None else words)
    if given[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not given or given == ["-m"]:
        _mistake(USAGE)
    prepare_children()
    if given[0] == "-m":
        _run_module(given[1], given[2:])
    elif Path(given[0]).exists():
        _run_script(given[0], given[1:])
    else:
        _run_command(given[0], given[1:])


def prepare_children() -> None:
    """Let the Python processes started from here import loftq as they begin."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(STARTUP) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *paths])


def _run_module(name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]  # runpy puts the file's path in front
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    folder = Path(path).resolve()
    sys.path.insert(0, str(folder.parent if folder.is_file() else folder))  # as `python FILE` does
    runpy.run_path(path, run_name="__main__")


def _run_command(name: str, arguments: list[str]) -> None:
    """A console script of an installed package, called as its stub would call it."""
    found = metadata.entry_points(group="console_scripts", name=name)
    if not found:
        _mistake(
            f"{name}: no such file, and no installed Python package has a command of that name. "
            "Give the path of a script, -m MODULE, or a command that is installed beside loftq."
        )
    sys.argv = [name, *arguments]
    sys.exit(next(iter(found)).load()())


def _mistake(message: str) -> None:
    print(message if message is USAGE else f"error: {message}", file=sys.stderr)
    raise SystemExit(MISTAKE)


if __name__ == "__main__":
    main()
