"""A comparison as a YAML file: axes, settings, exceptions, and the numbers others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from loftq.lab.compare.arms import parse_arm

RECIPE_VERSION = 1
SUFFIX = ".yaml"
AXES = ("task", "method", "format", "rank")
"""What a rule or a published row may name to say whom it is about."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options for some of the cells; a later rule wins over an earlier one."""

    when: Mapping[str, Any]
    """Axis -> value, or a list of values; an axis that is not named is free."""
    options: Mapping[str, Any]

    def covers(self, axes: Mapping[str, Any]) -> bool:
        """Whether it is about a cell with these axes."""
        return matches(self.when, axes)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of somebody's table."""

    source: str
    """Where it stands."""
    where: Mapping[str, Any]
    """The axes that it is about, in the words of the recipe."""
    scores: Mapping[str, Mapping[str, str] | None]
    """Task -> metric -> value, in the digits that were printed; None = it did not converge."""


@dataclass(frozen=True, kw_only=True)
class CompareRecipe:
    """Everything that decides the table of a comparison."""

    name: str
    purpose: str
    """Its first line."""
    model: str
    """Folder or hub id of the original model."""
    tasks: Mapping[str, Mapping[str, Any]]
    """Task -> options that differ for it."""
    methods: Sequence[str]
    """Arms, the first being what the others are compared with."""
    formats: Sequence[str] = ()
    """Formats by name, or bits as a number: `nf2-g64`, `2.5`."""
    ranks: Sequence[int] = (16,)
    seeds: int = 1
    """Runs of every cell, with seeds 0, 1, ..."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of every cell, over the defaults of its task."""
    headline: Mapping[str, str] = field(default_factory=dict)
    """Task -> metric that the table shows, where it is not the task's own."""
    rules: Sequence[Rule] = ()
    more: Sequence[Mapping[str, Any]] = ()
    """Further cells: axes (methods, formats, ranks, tasks, seeds) that differ from the above."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """model_type and sizes, so that a dry run needs no download."""
    published: Sequence[Published] = ()

    def __post_init__(self) -> None:
        problem = self._check()
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def _check(self) -> str:
        for axis in ("tasks", "methods", "ranks"):
            if not getattr(self, axis):
                return f"{axis} is empty."
        if self.seeds < 1:
            return f"seeds={self.seeds}: must be at least 1."
        arms = [parse_arm(word) for word in self.methods]
        if any(arm.quantizes for arm in arms) and not self.formats:
            return "methods that quantize need formats, such as formats: [nf2-g64]."
        for rule in self.rules:
            unknown = sorted(set(rule.when) - set(AXES))
            if unknown:
                return f"rules: {unknown[0]!r} is no axis; there are {', '.join(AXES)}."
        extra = {key for block in self.more for key in block} - set(MORE_AXES)
        if extra:
            return f"more: {sorted(extra)[0]!r} is no axis; there are {', '.join(MORE_AXES)}."
        return ""

    def options_for(self, axes: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a cell: of all, of its task, then of each rule that covers it."""
        found = {**self.training, **self.tasks[axes["task"]]}
        for rule in self.rules:
            if rule.covers(axes):
                found |= rule.options
        return found

    def changed(self, *, options: Mapping[str, Any] | None = None, **values: Any) -> CompareRecipe:
        """A copy with other axes or a model, None leaving one as it is.

        Args:
            options: for every cell, over all that the recipe says.
            **values: of model, tasks (names), methods, formats, ranks, seeds.

        Raises:
            ValueError: a task that the recipe does not have, or a value that makes no sense.
        """
        given = {key: value for key, value in values.items() if value is not None}
        if options:
            given["rules"] = (*self.rules, Rule(when={}, options=options))
        if "tasks" in given:
            given["tasks"] = {name: self._task(name) for name in given["tasks"]}
        if given.keys() & {"methods", "formats", "ranks", "tasks"}:
            given.setdefault("more", ())  # they belong to the axes that the recipe has
        return replace(self, **given)

    def _task(self, name: str) -> Mapping[str, Any]:
        if name not in self.tasks:
            raise ValueError(f"{self.name}: has no task {name!r}. It has {', '.join(self.tasks)}.")
        return self.tasks[name]


MORE_AXES = ("methods", "formats", "ranks", "tasks", "seeds")


def known_recipes() -> dict[str, str]:
    """Name -> text of every packaged comparison, sorted."""
    folder = files("loftq.lab").joinpath("recipes", "compare")
    found = [entry for entry in folder.iterdir() if entry.name.endswith(SUFFIX)]
    return {
        entry.name.removesuffix(SUFFIX): entry.read_text(encoding="utf-8")
        for entry in sorted(found, key=lambda entry: entry.name)
    }


def load_recipe(name: str) -> CompareRecipe:
    """A packaged comparison by name, or a YAML file by path.

    Raises:
        ValueError: no such recipe (with the nearest name), or a file that is none.
    """
    path = Path(name)
    if path.suffix in (SUFFIX, ".yml"):
        try:
            return read_recipe(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}).") from error
    known = known_recipes()
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no comparison {name!r}. {hint}There are {', '.join(known)}; a file of your own ends "
            "in .yaml."
        )
    return read_recipe(name, known[name])


def read_recipe(name: str, text: str) -> CompareRecipe:
    """The recipe in a YAML text.

    Raises:
        ValueError: not YAML, an unknown key, or a value that makes no sense.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected lines of `key: value`.")
    version = values.pop("version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise ValueError(f"{name}: version {version!r} is not {RECIPE_VERSION}: update loftq.")
    known = {f.name for f in fields(CompareRecipe)} - {"name", "purpose"}
    unknown = sorted(set(values) - known)
    if unknown:
        near = get_close_matches(unknown[0], known, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name}: unknown key {unknown[0]!r}. {hint}Known: {sorted(known)}.")
    missing = [key for key in ("model", "tasks", "methods") if not values.get(key)]
    if missing:
        raise ValueError(f"{name}: {missing[0]} is missing.")
    return CompareRecipe(
        name=name,
        purpose=text.splitlines()[0].lstrip("# "),
        model=str(values.pop("model")),
        tasks={str(k): dict(v or {}) for k, v in _mapping(name, values.pop("tasks")).items()},
        formats=tuple(str(word) for word in values.pop("formats", None) or ()),
        rules=tuple(_rule(name, rule) for rule in values.pop("rules", None) or ()),
        published=_published(name, values.pop("published", None) and text),
        **values,
    )


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, list):
        return dict.fromkeys(value)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: tasks: expected a list of names, or a mapping to their options.")
    return value


def _rule(name: str, value: Any) -> Rule:
    if not isinstance(value, dict) or "when" not in value:
        raise ValueError(f"{name}: rules: each has a `when` and options, found {value!r}.")
    rest = {key: item for key, item in value.items() if key != "when"}
    return Rule(when=dict(value["when"]), options=rest)


def _published(name: str, text: str | None) -> tuple[Published, ...]:
    """The `published` tables of a recipe, read as words: 5.70 is not 5.7."""
    if not text:
        return ()
    tables = yaml.load(text, Loader=yaml.BaseLoader)["published"]  # strings, lists and mappings
    return tuple(row for table in tables for row in _table(name, table))


def _table(name: str, value: Any) -> list[Published]:
    """The rows of one: source, columns (task -> metrics), rows."""
    columns: Mapping[str, Any] = value["columns"]
    rows = []
    for row in value["rows"]:
        scores = {
            task: _scores(name, task, _many(columns[task]), row[task])
            for task in row
            if task in columns
        }
        where = {axis: row[axis] for axis in AXES if axis in row}
        rows.append(Published(source=value["source"], where=where, scores=scores))
    return rows


def _scores(name: str, task: str, metrics: Sequence[str], printed: str) -> Mapping[str, str] | None:
    if printed == "N.A.":
        return None
    values = printed.split("/")
    if len(values) != len(metrics):
        raise ValueError(f"{name}: published: {task} has {len(metrics)} metrics, found {printed}.")
    return dict(zip(metrics, values, strict=True))


def matches(wanted: Mapping[str, Any], axes: Mapping[str, Any]) -> bool:
    """Whether each axis that `wanted` names has its value, or one of its values; 2 equals "2"."""
    return all(
        str(axes.get(name)) in [str(value) for value in _many(values)]
        for name, values in wanted.items()
    )


def _many(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)
