"""The measured costs of layers in formats, kept as lines of JSON: a killed measurement goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from loftq.checkpoint.durable import publish, write_partial

TABLE_VERSION = 1


class CostTable:
    """cost[module][format], read from a file and added to line by line.

    Args:
        path: of the file; made with the first row.

    Raises:
        ValueError: a file of another version, or a damaged line before the last one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.costs: dict[str, dict[str, float]] = {}
        if path.is_file():
            self._read()

    def missing(self, modules: Iterable[str], format: str) -> set[str]:
        """The modules whose cost in this format is not known."""
        return {module for module in modules if format not in self.costs.get(module, {})}

    def add(self, module: str, format: str, cost: float) -> None:
        """Note a cost, at once on disk."""
        self.costs.setdefault(module, {})[format] = cost
        if not self.path.exists():
            self._write()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_row(module, format, cost))

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if not lines or json.loads(lines[0]) != {"version": TABLE_VERSION}:
            raise ValueError(
                f"{self.path}: not a table of costs of version {TABLE_VERSION}. Remove the file; "
                "it is measured again."
            )
        torn = not lines[-1].endswith("\n")
        for number, line in enumerate(lines[1 : len(lines) - torn], 2):
            try:
                row = json.loads(line)
                self.costs.setdefault(row["module"], {})[row["format"]] = float(row["cost"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: damaged ({error}). Remove the line; its layer is "
                    "measured again."
                ) from error
        if torn:  # killed while writing
            self._write()

    def _write(self) -> None:
        rows = [
            _row(module, format, cost)
            for module, of_module in self.costs.items()
            for format, cost in of_module.items()
        ]
        head = json.dumps({"version": TABLE_VERSION}) + "\n"
        write_partial(self.path, "".join([head, *rows]).encode())
        publish(self.path)


def _row(module: str, format: str, cost: float) -> str:
    return json.dumps({"module": module, "format": format, "cost": cost}) + "\n"
