"""Exports: the packed model in the layout of another engine, the same weights to the bit."""

from loftq.integrations.export.run import Exported, export, readers
from loftq.integrations.export.source import ExportError, ExportSource, open_source
from loftq.integrations.export.targets import ENGINES, EXPORTS, Export

__all__ = [
    "ENGINES",
    "EXPORTS",
    "Export",
    "ExportError",
    "ExportSource",
    "Exported",
    "export",
    "open_source",
    "readers",
]
