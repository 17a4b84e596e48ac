"""`loftq doctor`: can this machine run loftq, and what would it lack?"""

from __future__ import annotations

from typing import Annotated

import typer

from loftq.cli import console, options

STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "red"}


Build = Annotated[
    bool, typer.Option("--build", help="Compile the CPU library with the system's C++ compiler.")
]


def doctor(build: Build = False, as_json: options.AsJson = False) -> None:
    """Check Python, packages, GPU, CPU library, disk, memory (exit 1 when loftq cannot work)."""
    with console.answering(as_json=as_json):
        from loftq.report.doctor import doctor as examine

        if build:
            _build(quiet=as_json)
        checks = examine()
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        console.emit({"ok": not failed, "checks": [check.to_dict() for check in checks]})
    else:
        from rich.text import Text

        shown = console.table("", "what", "found", "what to do")
        for check in checks:
            mark = Text(check.status, style=STYLES[check.status])
            shown.add_row(mark, check.name, check.found, check.advice)
        console.screen().print(shown)
    if failed:
        raise typer.Exit(1)


def _build(*, quiet: bool) -> None:
    """Compile the library of ops/cpu; an error of the command where that cannot be done."""
    from loftq.ops.cpu.build import build_library
    from loftq.ops.cpu.library import forget_library

    path = build_library()
    forget_library()
    if not quiet:
        console.screen().print(f"CPU library: {path}")
