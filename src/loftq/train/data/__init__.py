"""Training data: from a file, a folder or a hub id to what TRL's trainers take.

A row goes one way: file → row → sample (formats.py) → text with its answers (rendering.py) → tokens
with a loss mask (encode.py) → data set. Preferences leave it after the sample (pairs.py).
"""

from loftq.train.data.counts import DataCounts
from loftq.train.data.prepare import Prepared, prepare
from loftq.train.data.problems import DataError
from loftq.train.data.settings import DataSettings
from loftq.train.data.show import HeldOut, RenderedExample

__all__ = [
    "DataCounts",
    "DataError",
    "DataSettings",
    "HeldOut",
    "Prepared",
    "RenderedExample",
    "prepare",
]
