"""What follows a finished output or run: its page, and its upload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from loftq.integrations.publish import Pushed


class Finish:
    """report.html and --push-to-hub of one folder; what cannot work is refused when it is made."""

    def __init__(self, folder: Path, keys: Mapping[str, Any], repo: str | None) -> None:
        """Check what was asked for, before any work.

        Args:
            folder: OUT or RUN.
            keys: those of `options.AFTER_KEYS` that were given: report (False: no page; True: a
                page or an error; absent: a page where the [report] extra is installed), private,
                base.
            repo: hub repository to push to.

        Raises:
            ValueError: a page was asked for and cannot be made; a repository that cannot be pushed
                to; private or base without one.
        """
        from loftq.report.html import HOW_TO_GET, ReportError, missing_packages

        self.folder, self.keys = folder, keys
        self.page: Path | None = None
        self.no_page = ""
        self.pushed: Pushed | None = None
        absent = missing_packages()
        if keys.get("report", True) and absent:
            self.no_page = f"needs {' and '.join(absent)}: {HOW_TO_GET}"
            if keys.get("report"):
                raise ReportError(f"report=true: {self.no_page}.")
        if repo is None and keys.keys() & {"private", "base"}:
            raise ValueError("private and base say how to push: give --push-to-hub REPO too.")
        self.repo = repo
        if repo is not None:
            from loftq.integrations.publish import check_repo

            self.repo = check_repo(repo)

    def write_page(self) -> None:
        """Write report.html. The folder is complete without it: a failure is told, not raised."""
        from loftq.report.html import REPORT, write_report

        (self.folder / REPORT).unlink(missing_ok=True)  # of what was there before
        if self.no_page or not self.keys.get("report", True):
            return
        try:
            self.page = write_report(self.folder)
        except (ValueError, OSError) as error:
            self.no_page = f"not written: {error}"

    def push(self) -> None:
        """Upload, if it was asked for."""
        if self.repo is None:
            return
        from loftq.integrations.publish import push

        private, base = bool(self.keys.get("private")), self.keys.get("base")
        self.pushed = push(self.folder, self.repo, private=private, base=base)

    def add_rows(self, lines: Table) -> None:
        """For people: where the page is, or how to get one, and where the upload is."""
        if self.page is not None:
            lines.add_row("report", str(self.page), "open it in a browser")
        elif self.no_page:
            lines.add_row("report", "none", self.no_page)
        if self.pushed is not None:
            base = f", base_model {self.pushed.base}" if self.pushed.base else ""
            lines.add_row("pushed", self.pushed.url, f"{console.size(self.pushed.bytes)}{base}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        page = None if self.page is None else str(self.page)
        return {"report": page, "pushed": None if self.pushed is None else asdict(self.pushed)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """loftq.json of a finished output, or None."""
    try:
        found = json.loads((folder / "loftq.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "source" in found and "config" in found else None
