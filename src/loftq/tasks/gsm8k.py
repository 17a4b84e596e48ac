"""GSM8K (arXiv:2110.14168): trained on question and reasoning, answered greedily.

Defaults are those of LoftQ for LLaMA-2-7b (arXiv:2310.08659, appendix): batch 16, 6 epochs, 3e-4.
"""

from __future__ import annotations

from dataclasses import replace

from loftq.tasks.base import Splits
from loftq.tasks.kinds.reasoning import Reasoning

GSM8K = Reasoning(
    name="gsm8k",
    title="GSM8K",
    local="gsm8k",
    hub="openai/gsm8k:main",
    splits=Splits(train=("train",), test=("test",)),
    primary="exact_match",
    defaults={
        "batch_size": 4, "gradient_accumulation": 4, "epochs": 6, "learning_rate": 3e-4,
        "scheduler": "cosine", "warmup": 0.03, "weight_decay": 0.1, "max_length": 512,
    },
    paper="arXiv:2110.14168",
)  # fmt: skip

GSM8K_LOSS = replace(
    GSM8K,
    name="gsm8k-loss",
    title="GSM8K (answer loss)",
    primary="answer_loss",
    greater_is_better=False,
    generates=False,
)
"""For models that solve none of the problems: nats a token of the given answers."""
