"""What a model scores: perplexity over text."""

from loftq.eval.perplexity import PerplexityResult, perplexity
from loftq.eval.text import encode, read_text, split_of

__all__ = ["PerplexityResult", "encode", "perplexity", "read_text", "split_of"]
