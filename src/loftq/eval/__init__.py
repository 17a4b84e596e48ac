"""What a model scores: perplexity over text, and what moving an adapter to another base costs."""

from loftq.eval.gap import LARGE_GAP, LossGap, lora_gap
from loftq.eval.perplexity import PerplexityResult, perplexity
from loftq.eval.protocols import PROTOCOLS, ProtocolResult, protocol_perplexity
from loftq.eval.text import encode, read_rows, read_text, split_of

__all__ = [
    "LARGE_GAP",
    "PROTOCOLS",
    "LossGap",
    "PerplexityResult",
    "ProtocolResult",
    "encode",
    "lora_gap",
    "perplexity",
    "protocol_perplexity",
    "read_rows",
    "read_text",
    "split_of",
]
