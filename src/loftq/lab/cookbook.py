"""Recipes of `loftq train`: YAML files to copy and edit, part of the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SUFFIX = ".yaml"


def recipes() -> dict[str, str]:
    """Name -> text of every recipe, sorted."""
    folder = files("loftq.lab").joinpath("recipes")
    found = [entry for entry in folder.iterdir() if entry.name.endswith(SUFFIX)]
    return {
        entry.name.removesuffix(SUFFIX): entry.read_text(encoding="utf-8")
        for entry in sorted(found, key=lambda entry: entry.name)
    }


def purpose(text: str) -> str:
    """What a recipe is for: its first line."""
    return text.splitlines()[0].lstrip("# ")


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a recipe into a folder, or to a file; returns the file.

    Raises:
        ValueError: no recipe of that name, or the file exists.
    """
    known = recipes()
    if name not in known:
        raise ValueError(f"no recipe {name!r}. There are {', '.join(known)}.")
    path = target / f"{name}{SUFFIX}" if target.is_dir() else target
    if path.exists():
        raise ValueError(f"{path}: exists. Choose another name, or remove it first.")
    path.write_text(known[name], encoding="utf-8")
    return path
