"""The table of all_methods.py: a markdown row for each row, by format and rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from calibrated import spread
from sharing import FAILED, Rows


def show(
    rows: Rows, reference: str, tunings: Mapping[str, Sequence[str]], *, shared: str
) -> list[str]:
    """Print the table of the rows that are there.

    Args:
        rows: of the folder.
        reference: row of the original model.
        tunings: row -> names of the rows of its tunings.
        shared: row of what all others read, whose time counts as well.

    Returns:
        Names of the rows that failed.
    """
    original, failed = rows.find(reference), []
    if original is None or FAILED in original:
        print("the original model is not scored yet")
        return [] if original is None else [reference]
    known = original["before"]
    heads = ["method", "format", "rank", "bits", "MB", "output error"]
    heads += [f"{name} {when}" for when in ("before", "after") for name in known]
    heads += ["solve s", "tune s", "commit"]
    print(machines(original["machine"]))
    print(f"| {' | '.join(heads)} |")
    print(f"|---|---|{'--:|' * (len(heads) - 3)}---|")
    cells = ["original", "-", "-", "16", "-", "0", *(f"{v:.2f}" for v in known.values())]
    print(f"| {' | '.join([*cells, *['-'] * (len(known) + 2), original['machine']['commit']])} |")
    minutes = sum(one["job_s"] for one in (original, rows.find(shared)) if one) / 60
    for name, seeds in tunings.items():
        row, after = rows.find(name), [rows.find(seed) for seed in seeds]
        failed += [
            n for n, r in zip((name, *seeds), (row, *after), strict=True) if FAILED in (r or {})
        ]
        minutes += sum(one["job_s"] for one in (row, *after) if one is not None) / 60
        if row is not None and FAILED not in row:
            done = [one for one in after if one is not None and FAILED not in one]
            print(line(name, row, done, known))
    print(f"{minutes:.1f} minutes in all, those of processes that shared a device added up.")
    return failed


def line(name: str, row: dict[str, Any], tuned: list[dict[str, Any]], known: dict) -> str:
    """A markdown row: medians and ranges over the tunings that are there."""
    method, form, rank, *more = name.split(":")
    error = row["output_error"]
    cells = [":".join([method, *more]), form, rank, f"{row['bits']:.3f}"]
    cells += [f"{row['total_bytes'] / 1e6:.1f}", "-" if math.isnan(error) else f"{error:.4f}"]
    cells += [f"{row['before'][text]:.2f}" for text in known]
    cells += [spread([one["after"][text] for one in tuned]) for text in known]
    cells += [f"{row['solve_s']:.1f}", spread([one["tune_s"] for one in tuned])]
    return f"| {' | '.join([*cells, row['machine']['commit']])} |"


def machines(machine: dict[str, str]) -> str:
    """Where the rows come from."""
    return ", ".join(f"{key} {value}" for key, value in machine.items() if key != "commit")
