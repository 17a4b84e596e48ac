"""Tiny random models of every supported family, offline and in milliseconds.

Sizes are awkward on purpose: hidden 48, intermediate 75 where the family allows it, 2 blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

VOCAB, WIDTH, ODD, BLOCKS, HEADS = 101, 48, 75, 2, 4


class Tiny(NamedTuple):
    """How to make one model and what to feed it."""

    config: Callable[[], hf.PreTrainedConfig]
    auto: Any
    """Auto class of the model with its head."""
    inputs: Callable[[], dict[str, Tensor]]
    """Example inputs, with labels where the head takes them."""


def build(name: str, *, seed: int = 0) -> hf.PreTrainedModel:
    """The model `name` of the zoo with random float32 weights, in eval mode."""
    torch.manual_seed(seed)
    return ZOO[name].auto.from_config(ZOO[name].config()).float().eval()


def build_base(name: str, *, seed: int = 0) -> hf.PreTrainedModel:
    """The same without a head."""
    torch.manual_seed(seed)
    return hf.AutoModel.from_config(ZOO[name].config()).float().eval()


def save(model: hf.PreTrainedModel, folder: Path) -> Path:
    """Save as safetensors and return the folder."""
    model.save_pretrained(folder)
    return folder


def tokens(rows: int = 2, columns: int = 9) -> Tensor:
    """Fixed token ids, none of them special."""
    return 5 + torch.arange(rows * columns).reshape(rows, columns) * 7 % (VOCAB - 5)


def _causal() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def _masked() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def _classified() -> dict[str, Tensor]:
    return {**_masked(), "labels": torch.tensor([0, 1])}


def _seq2seq() -> dict[str, Tensor]:
    return {**_masked(), "labels": tokens(2, 5)}


def _image() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def _image_and_text() -> dict[str, Tensor]:
    ids = tokens(1, 12)
    ids[:, 1:5] = VOCAB - 1  # 16 x 16 pixels in patches of 8: four image tokens
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def _decoder(kind: type, **more: Any) -> Callable[[], hf.PreTrainedConfig]:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": ODD,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return lambda: kind(**{**common, **more})


def _encoder(kind: type, **more: Any) -> Callable[[], hf.PreTrainedConfig]:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": ODD,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return lambda: kind(**{**common, **more})


_DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_DEBERTA_V2 = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "conv_kernel_size": 3,
    "type_vocab_size": 0,
}
# Grouped matrix products want rows of whole 16 bytes, so nothing odd among the experts.
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 12, "intermediate_size": 80}


def _opt(**more: Any) -> hf.PreTrainedConfig:
    return hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=ODD,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"word_embed_proj_dim": WIDTH, **more},
    )


def _gpt2() -> hf.PreTrainedConfig:
    return hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_inner=ODD,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def _bart() -> hf.PreTrainedConfig:
    return hf.BartConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=BLOCKS,
        decoder_layers=BLOCKS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=ODD,
        decoder_ffn_dim=ODD,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )


def _t5() -> hf.PreTrainedConfig:
    return hf.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=12,
        d_ff=ODD,
        num_layers=BLOCKS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _vit() -> hf.PreTrainedConfig:
    return hf.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=ODD,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )


def _llava() -> hf.PreTrainedConfig:
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=ODD,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    return hf.LlavaConfig(
        vision_config=vision,
        text_config=_decoder(hf.LlamaConfig)(),
        image_token_index=VOCAB - 1,
        image_token_id=VOCAB - 1,
        image_seq_length=4,
        vision_feature_layer=-1,
    )


_LM, _CLASSIFIER = hf.AutoModelForCausalLM, hf.AutoModelForSequenceClassification

ZOO: dict[str, Tiny] = {
    "llama": Tiny(_decoder(hf.LlamaConfig), _LM, _causal),
    "llama-tied": Tiny(_decoder(hf.LlamaConfig, tie_word_embeddings=True), _LM, _causal),
    "mistral": Tiny(_decoder(hf.MistralConfig), _LM, _causal),
    "qwen2": Tiny(_decoder(hf.Qwen2Config), _LM, _causal),
    "qwen3": Tiny(_decoder(hf.Qwen3Config, head_dim=16), _LM, _causal),
    "gemma2": Tiny(_decoder(hf.Gemma2Config, head_dim=12, tie_word_embeddings=True), _LM, _causal),
    "gemma3": Tiny(
        _decoder(hf.Gemma3TextConfig, head_dim=12, tie_word_embeddings=True), _LM, _causal
    ),
    "phi": Tiny(_decoder(hf.PhiConfig, num_key_value_heads=HEADS), _LM, _causal),
    "phi3": Tiny(_decoder(hf.Phi3Config), _LM, _causal),
    "falcon": Tiny(
        _decoder(hf.FalconConfig, new_decoder_architecture=False, multi_query=True, bias=False),
        _LM,
        _causal,
    ),
    "opt": Tiny(_opt, _LM, _causal),
    "opt-projected": Tiny(lambda: _opt(word_embed_proj_dim=32), _LM, _causal),
    "gpt2": Tiny(_gpt2, _LM, _causal),
    "bert": Tiny(_encoder(hf.BertConfig), _CLASSIFIER, _classified),
    "bert-masked": Tiny(_encoder(hf.BertConfig), hf.AutoModelForMaskedLM, _masked),
    "roberta": Tiny(_encoder(hf.RobertaConfig), _CLASSIFIER, _classified),
    "deberta-v2": Tiny(_encoder(hf.DebertaV2Config, **_DEBERTA_V2), _CLASSIFIER, _classified),
    "deberta-v3": Tiny(_encoder(hf.DebertaV2Config, **_DEBERTA_V3), _CLASSIFIER, _classified),
    "mpnet": Tiny(_encoder(hf.MPNetConfig), _CLASSIFIER, _classified),
    "bart": Tiny(_bart, hf.AutoModelForSeq2SeqLM, _seq2seq),
    "t5": Tiny(_t5, hf.AutoModelForSeq2SeqLM, _seq2seq),
    "vit": Tiny(_vit, hf.AutoModelForImageClassification, _image),
    "mixtral": Tiny(_decoder(hf.MixtralConfig, num_local_experts=3, **_EXPERTS), _LM, _causal),
    "qwen2-moe": Tiny(
        _decoder(
            hf.Qwen2MoeConfig,
            num_experts=3,
            moe_intermediate_size=80,
            shared_expert_intermediate_size=ODD,
            **_EXPERTS,
        ),
        _LM,
        _causal,
    ),
    "llava": Tiny(_llava, hf.AutoModelForImageTextToText, _image_and_text),
}
