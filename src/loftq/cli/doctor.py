"""`loftq doctor`: can this machine run loftq, and what would it lack?"""

from __future__ import annotations

import typer

from loftq.cli import console, options

STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "red"}


def doctor(as_json: options.AsJson = False) -> None:
    """Check Python, packages, GPU, bfloat16, disk and memory (exit 1 when loftq cannot work)."""
    with console.answering(as_json=as_json):
        from loftq.report.doctor import doctor as examine

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
