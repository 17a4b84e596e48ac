"""Which packed layer stands in for which dense one, in models of transformers."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq.integrations.conv1d import QuantConv1D
from loftq.integrations.embedding import QuantEmbedding
from loftq.nn import Builders, QuantLinear

BUILDERS: Builders = {
    nn.Linear: QuantLinear,
    Conv1D: QuantConv1D,
    nn.Embedding: QuantEmbedding,
}
