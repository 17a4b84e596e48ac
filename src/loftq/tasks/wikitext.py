"""WikiText-2 (arXiv:1609.07843): blocks of 1024 tokens to train on, three perplexities.

Defaults are those of LoftQ for LLaMA-2-7b (arXiv:2310.08659, appendix): batch 32, 2 epochs, 3e-4.
"""

from __future__ import annotations

from dataclasses import replace

from loftq.tasks.base import Splits
from loftq.tasks.kinds.language import Language

WIKITEXT2 = Language(
    name="wikitext2",
    title="WikiText-2",
    local="wikitext2",
    hub="Salesforce/wikitext:wikitext-2-raw-v1",
    files={"train": "wiki.train", "validation": "wiki.valid", "test": "wiki.test"},
    splits=Splits(train=("train",), validation=("validation",), test=("test",)),
    primary="perplexity_gptq",
    defaults={
        "batch_size": 4, "gradient_accumulation": 8, "epochs": 2, "learning_rate": 3e-4,
        "scheduler": "cosine", "warmup": 0.03, "weight_decay": 0.1, "max_length": 1024,
        "samples": 2,
    },
    paper="arXiv:1609.07843",
)  # fmt: skip

WIKITEXT2_SMALL = replace(
    WIKITEXT2,
    name="wikitext2-small",
    title="WikiText-2, trained on its validation split",
    splits=Splits(train=("validation",), test=("test",)),
)
"""Where the train split is not at hand; say so beside every number."""
