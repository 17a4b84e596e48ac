"""report.html: one page, self-contained, about an output of `quantize` or a run of `train`.

Nothing in it is fetched and nothing runs: styles and figures are inline, and a content security
policy in its head forbids the rest. All text from files goes through jinja2's escaping.
"""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loftq import __version__
from loftq.checkpoint.durable import publish, write_partial
from loftq.report.collect import Backbone, Facts, collect
from loftq.report.headline import next_commands, tiles
from loftq.units import duration, size

REPORT = "report.html"
PACKAGES = ("jinja2", "matplotlib")
HOW_TO_GET = "pip install 'loftq[report]'"


class ReportError(ValueError):
    """The page cannot be made here."""


def missing_packages() -> list[str]:
    """Packages of the [report] extra that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def write_report(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    source: str | None = None,
    layers: Sequence[str] = (),
) -> Path:
    """Write the page of an output of `loftq quantize` or a run of `loftq train`.

    Args:
        folder: OUT or RUN.
        output: file to write; None = report.html in the folder.
        source: folder or cached hub id of the model that OUT was made from; None = where loftq.json
            says. Without it the page has no singular values, and says so. Nothing is downloaded.
        layers: modules whose singular values are shown; empty = three typical ones.

    Returns:
        The file written.

    Raises:
        ReportError: the [report] extra is not installed.
        ValueError: neither an OUT nor a RUN, or an unknown layer.
    """
    absent = missing_packages()
    if absent:
        raise ReportError(f"a report needs {' and '.join(absent)}: {HOW_TO_GET}.")
    path = Path(folder) / REPORT if output is None else Path(output)
    page = render(collect(folder, source=source, layers=layers)).encode()
    write_partial(path, page)
    publish(path)
    return path


def render(facts: Facts) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("loftq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size, "duration": duration, "error": _error, "words": _words, "value": _value,
        "as_yaml": _as_yaml,
    }  # fmt: skip
    return environment.get_template("report.html").render(
        facts=facts,
        tiles=tiles(facts),
        drawings=_drawings(facts),
        kept=[] if facts.backbone is None else _kept(facts.backbone),
        commands=next_commands(facts),
        version=__version__,
        now=datetime.datetime.now(datetime.timezone.utc),
    )


def _drawings(facts: Facts) -> dict[str, list[Any]]:
    """The figures by section, their SVG marked as ready for the page."""
    from markupsafe import Markup

    from loftq.report import plots

    found: dict[str, list[plots.Drawing]] = {"loss": [], "memory": [], "bytes": [], "errors": [],
                                             "spectra": []}  # fmt: skip
    training, backbone = facts.training, facts.backbone
    if training is not None and training.metrics.train:
        found["loss"].append(plots.loss_drawing(training.metrics, training.loss_unit))
    if training is not None and training.memory:
        found["memory"].append(plots.memory_drawing(training.memory, training.measured_peak))
    if backbone is not None:
        found["bytes"].append(plots.bytes_drawing(backbone.report.bytes))
        found["errors"] += plots.error_drawings(backbone.grid)
        for number, spectrum in enumerate(backbone.spectra, 1):
            found["spectra"].append(plots.spectrum_drawing(spectrum, number))
    return {
        name: [{"name": x.name, "caption": x.caption, "svg": Markup(x.svg)} for x in drawings]
        for name, drawings in found.items()
    }


def _kept(backbone: Backbone) -> list[tuple[str, int, int, str]]:
    """(reason, modules, parameters, first module) of what stays unquantized."""
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for kept in backbone.kept:
        reasons.setdefault(str(kept["reason"]), []).append(kept)
    return [
        (reason, len(members), sum(x["parameters"] for x in members), str(members[0]["module"]))
        for reason, members in reasons.items()
    ]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _value(value: Any) -> str:
    """A number, name or list of a record in one cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)


def _as_yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True).strip()
