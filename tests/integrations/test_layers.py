"""Conv1D and Embedding with packed weights."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq.formats import parse_format
from loftq.integrations import _hook
from loftq.integrations.conv1d import QuantConv1D
from loftq.integrations.embedding import QuantEmbedding
from packed_folder import quantize, write_packed
from tolerances import FLOAT64_SOLVE, MERGE_LOGITS
from zoo import build

_hook.install()
FORMATS = ["nf4-g16", "nf3-g32", "nf2-g64-bf16", "int3-g16", "int4-channel-f32", "sint8-g32-f16",
           "uniform4"]  # fmt: skip


def test_conv1d_computes_what_the_dense_one_does():
    torch.manual_seed(0)
    dense = Conv1D(40, 24)
    layer = QuantConv1D.from_dense(dense, parse_format("nf4-g16"))
    layer.fill_(quantize(dense.weight.data.T, "nf4-g16"))
    assert layer.weight.shape == dense.weight.shape == (24, 40)
    layer.double()
    twin = copy.deepcopy(layer).dequantize_()
    assert type(twin) is Conv1D
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(x), rtol=FLOAT64_SOLVE, atol=FLOAT64_SOLVE)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 24\)"):
        layer(x[..., 1:])


def test_conv1d_with_lora_merges(tmp_path):
    write_packed(build("gpt2"), tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    peft_model = get_peft_model(model, config).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = peft_model(ids).logits
        merged = peft_model.merge_and_unload()
        assert (merged(ids).logits - before).abs().max() <= MERGE_LOGITS * before.abs().max()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_rows_are_the_dense_rows_bit_for_bit(name: str):
    torch.manual_seed(0)
    dense = nn.Embedding(53, 40, padding_idx=1)
    layer = QuantEmbedding.from_dense(dense, parse_format(name)).fill_(
        quantize(dense.weight.data, name)
    )
    ids = torch.randint(0, 53, (3, 7))
    assert torch.equal(layer(ids), nn.functional.embedding(ids, layer.dequantize()))
    assert layer(ids[:0]).shape == (0, 7, 40)
    layer.bfloat16()
    assert torch.equal(layer(ids), nn.functional.embedding(ids, layer.dequantize()))
    twin = layer.dequantize_()
    assert type(twin) is nn.Embedding
    assert twin.padding_idx == 1


def test_embedding_that_renormalises_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        QuantEmbedding.from_dense(nn.Embedding(5, 32, max_norm=1.0), parse_format("nf4-g32"))


def test_embeddings_load_train_and_merge(tmp_path):
    dense = write_packed(build("bert"), tmp_path / "out", embeddings=True)
    model = type(dense).from_pretrained(tmp_path / "out")
    table = model.bert.embeddings.word_embeddings
    assert isinstance(table, QuantEmbedding)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)
    config = LoraConfig(r=2, target_modules=["word_embeddings", "query"])
    peft_model = get_peft_model(model, config).eval()
    peft_model(ids).logits.sum().backward()
    for name, parameter in peft_model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora" in name)
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    peft_model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = peft_model(ids).logits
        again = type(dense).from_pretrained(tmp_path / "out")
        loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
        assert torch.equal(loaded(ids).logits, wanted)
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted)
    assert type(merged.bert.embeddings.word_embeddings) is nn.Embedding
