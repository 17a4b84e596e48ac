"""Tokens to statistics of the inputs of each layer."""

from loftq.calibration.accumulators import KINDS, Accumulator, InputStatistics
from loftq.calibration.collect import (
    OUTSIDE,
    BlockModel,
    Run,
    advance,
    call_again,
    collect,
    layers_in,
    standing,
)
from loftq.calibration.data import (
    TokenWindows,
    document_windows,
    read_documents,
    stream_windows,
)
from loftq.calibration.fisher import Fisher, FisherStore, collect_fisher
from loftq.calibration.sequence import Recall, SequentialStatistics
from loftq.calibration.store import StatisticsStore, default_folder, statistics_fingerprint

__all__ = [
    "KINDS",
    "OUTSIDE",
    "Accumulator",
    "BlockModel",
    "Fisher",
    "FisherStore",
    "InputStatistics",
    "Recall",
    "Run",
    "SequentialStatistics",
    "StatisticsStore",
    "TokenWindows",
    "advance",
    "call_again",
    "collect",
    "collect_fisher",
    "default_folder",
    "document_windows",
    "layers_in",
    "read_documents",
    "standing",
    "statistics_fingerprint",
    "stream_windows",
]
