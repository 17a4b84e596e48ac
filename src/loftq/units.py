"""Sizes and durations as a reader of a terminal, a page or a card wants them."""

from __future__ import annotations


def size(length: float) -> str:
    """Bytes in decimal units, as disks are sold: 78.2 MB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while length >= 999.5 and len(units) > 1:
        length /= 1000
        units.pop(0)
    return f"{length:.0f} B" if units[0] == "B" else f"{length:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """under 1 s, 1.5 s, 2 min 05 s, 1 h 02 min."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
