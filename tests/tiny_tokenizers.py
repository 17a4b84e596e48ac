"""Small tokenizers built on the spot, which lose none of the characters that they know."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "the cat sat on the mat and thought about nothing in particular, as cats do.",
    "system user assistant tool: Hello there! How are you? Fine, thanks.\n\n### Instruction:\n",
)

LETTERS = string.printable + "äöüß日本"
"""All that the style `spaces` knows; `bytes` knows everything."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny(
    style: str = "bytes", *, template: str | None = CHATML, bos: bool = False, **special: str | None
) -> Any:
    """A fast tokenizer: `bytes` as GPT-2's, `spaces` as Llama-2's, which begins with a space.

    Args:
        style: bytes or spaces.
        template: its chat template.
        bos: whether it starts each text with <s>.
        special: other special tokens, or None for none of that name.
    """
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if style == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = list(LETTERS)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names: dict[str, str | None] = {
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }  # fmt: skip
    given = {name: token for name, token in (names | special).items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **given)
