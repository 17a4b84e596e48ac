"""The predicted peak is that of real training steps, whatever the part that makes it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf

import loftq
import zoo
from loftq.train.keep import keep_blocks
from loftq.train.memory import (
    PARTS,
    TrainingSettings,
    UnknownModel,
    predict,
    savings,
    subject_of_config,
    subject_of_output,
)
from loftq.train.memory.live import LiveBytes
from loftq.train.memory.loss import HeadOfLoss, loss_bytes
from loftq.train.memory.predict import DTYPES
from loftq.train.memory.probe import POINTWISE, dense_bytes, pointwise_scratch
from loftq.train.prepare import prepare_for_training

chunked = pytest.importorskip("trl.kernels.chunked_logprob")


def config(**changes: object) -> hf.PreTrainedConfig:
    """A model in which blocks, loss and adapters all weigh something."""
    values = {
        "vocab_size": 3000, "hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return hf.Qwen3Config(**{**values, **changes})


def measured(settings: TrainingSettings, options: dict[str, object], **changes: object) -> int:
    """Live bytes of a real step of the same model at its peak, weights included."""
    torch.manual_seed(0)
    dtype = DTYPES[settings.dtype]
    model = loftq.quantize_model(hf.AutoModelForCausalLM.from_config(config(**changes)), **options)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    prepare_for_training(model, checkpointing=settings.checkpointing, fused=settings.fused)
    keep_blocks(model, settings.keep_blocks)
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, fused=True)
    ids = torch.randint(3, 3000, (settings.batch_size, settings.length))
    scratch = {
        torch.ops.loftq.dequantize.default: lambda args, result: 9 * result.numel(),
        torch.ops.loftq.quant_linear.default: lambda args, result: dense_bytes(
            result.shape[-1], args[0].shape[-1], args[0].dtype, "cpu"
        ),
        torch.ops.loftq.quant_linear_backward.default: lambda args, result: dense_bytes(
            args[1].shape[0], args[5], args[0].dtype, "cpu"
        ),
    }
    for name in POINTWISE:
        operator = getattr(torch.ops.loftq, name).default
        scratch[operator] = lambda args, result: pointwise_scratch(args[0].numel(), "cpu")
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with LiveBytes(scratch) as live:
        live.ignore(*model.parameters(), *model.buffers())
        for _ in range(2):
            with autocast:
                out = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
            (-out.log_probs.sum() / ids.numel()).backward()
            del out
            optimizer.step()
            optimizer.zero_grad()
    return sum(weights.values()) + live.peak


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize(
    "changes",
    [
        {"length": 64, "dtype": "fp32"},
        {"length": 512, "dtype": "bf16"},
        {"length": 512, "dtype": "bf16", "fused": False},
        {"length": 512, "dtype": "fp32", "checkpointing": False},
        {"length": 512, "dtype": "bf16", "keep_blocks": 3},
        {"length": 512, "dtype": "bf16", "keep_blocks": 5},
    ],
)
def test_the_prediction_is_within_5_percent_of_a_real_step(
    rank: int, changes: dict[str, object]
) -> None:
    settings = TrainingSettings(device="cpu", **changes)
    options = {"rank": rank, "method": "qlora"}
    found = predict(subject_of_config(config(), **options), settings).total
    assert found == pytest.approx(measured(settings, options), rel=0.05)


def test_packed_tables_and_few_bits_count() -> None:
    settings = TrainingSettings(length=128, dtype="fp32", device="cpu")
    options = {"rank": 8, "method": "qlora", "bits": 2, "embedding": 8, "head": 8}
    found = predict(subject_of_config(config(), **options), settings)
    assert found.embedding == found.head == 3000 * (128 + 4)
    assert found.total == pytest.approx(measured(settings, options), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(300, 2000), (64, 40000)])
def test_the_loss_takes_what_is_said(dtype: torch.dtype, tokens: int, vocabulary: int) -> None:
    hidden = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 64, dtype=dtype)
    ids = torch.randint(0, vocabulary, (tokens,))
    head = HeadOfLoss(vocabulary=vocabulary, hidden=64, packed=False)
    peaks = []
    with LiveBytes() as live:
        live.ignore(hidden, weight, ids)
        wanted = ("log_probs", "entropy", "is_top1")
        log_probs, *_ = chunked.ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, 32768, None, 1.0, wanted
        )
        peaks.append(live.peak)
        live.reset()
        log_probs.sum().backward()
        peaks.append(live.peak)
    for peak, backward in zip(peaks, (False, True), strict=True):
        said = loss_bytes(
            head, kind="chunked", tokens=tokens, dtype=dtype, device="cpu", backward=backward
        )
        assert said == pytest.approx(peak, rel=0.08)


def test_parts_add_up_and_no_part_is_lost() -> None:
    peak = predict(subject_of_config(config(), rank=8), TrainingSettings())
    assert set(peak.parts) == set(PARTS)
    assert peak.total == sum(peak.parts.values())
    assert peak.to_dict()["total"] == peak.total
    assert peak.optimizer == 2 * peak.adapters


def test_an_output_is_what_its_plan_was(tmp_path: Path) -> None:
    tied = config(tie_word_embeddings=True)
    model = hf.AutoModelForCausalLM.from_config(tied)
    source = zoo.save(model, tmp_path / "source")
    loftq.quantize(source, tmp_path / "out", rank=4, method="qlora", embedding=8, device="cpu")
    settings = TrainingSettings(length=256, device="cpu", dtype="fp32")
    found = predict(subject_of_output(tmp_path / "out"), settings)
    assert found == predict(subject_of_config(tied, rank=4, method="qlora", embedding=8), settings)
    assert found.head == 0


def test_a_mask_a_longer_row_and_more_rank_take_more() -> None:
    subject, settings = subject_of_config(config(), rank=8), TrainingSettings(length=256)
    least = predict(subject, settings).total
    for changed in ({"length": 512}, {"padded": True}, {"batch_size": 2}, {"checkpointing": False}):
        more = TrainingSettings(**{"length": 256, **changed})
        assert predict(subject, more).total > least, changed
    assert predict(subject.with_rank(32), settings).total > least
    host = TrainingSettings(length=256, embedding_on_host=True)
    on_host = predict(subject, host)
    assert (on_host.embedding, on_host.host) == (0, 2 * 3000 * 128)


def test_inputs_in_host_memory_are_not_on_the_device() -> None:
    subject = subject_of_config(config(num_hidden_layers=24))
    settings = TrainingSettings(batch_size=2, length=512)
    here, there = predict(subject, settings), predict(subject, replace(settings, offload=True))
    one = 2 * 512 * 128 * 2
    assert (here.host, there.host) == (0, 24 * one)
    assert there.activations < here.activations
    assert 0 < here.total - there.total <= 22 * one  # two stay on the device
    assert "offload=true" in {saving.change for saving in savings(subject, settings, count=99)}
    kept = replace(settings, keep_blocks=4)
    assert "keep_blocks=0" in {saving.change for saving in savings(subject, kept, count=99)}


def test_savings_are_differences_of_predictions() -> None:
    subject = subject_of_config(config(vocab_size=60000), rank=8)
    settings = TrainingSettings(batch_size=4, length=256, checkpointing=False)
    best = savings(subject, settings)
    assert len(best) == 2
    assert best[0].saved >= best[1].saved > 0
    every = {saving.change: saving for saving in savings(subject, settings, count=99)}
    without = TrainingSettings(batch_size=4, length=256)
    now = predict(subject, settings).total
    assert every["checkpointing=true"].saved == now - predict(subject, without).total
    assert "embedding=8" in every
    assert "batch_size=2 gradient_accumulation=2" in every


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi3", "falcon", "opt", "gpt2"])
def test_other_families_are_walked_through_too(name: str) -> None:
    subject = subject_of_config(zoo.ZOO[name].config(), rank=4)
    peak = predict(subject, TrainingSettings(length=32, batch_size=2, device="cpu", dtype="fp32"))
    assert peak.activations > 0
    assert subject.blocks == zoo.BLOCKS


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("bert"), tmp_path / "bert")
    loftq.quantize(source, tmp_path / "out", rank=4, method="qlora", device="cpu")
    with pytest.raises(UnknownModel, match="predicted for causal language models"):
        subject_of_output(tmp_path / "out")
    with pytest.raises(UnknownModel, match="no output of"):
        subject_of_output(source)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="optimizer='sgd': one of"):
        TrainingSettings(optimizer="sgd")
    with pytest.raises(ValueError, match="length=0: must be at least 1"):
        TrainingSettings(length=0)


def test_what_a_run_cannot_have_is_not_proposed() -> None:
    subject = subject_of_config(config(num_hidden_layers=24, vocab_size=60000))
    settings = TrainingSettings(batch_size=2, length=512)
    offered = {s.change for s in savings(subject, settings, count=99)}
    barred = frozenset({"offload", "host_embedding"})
    left = {s.change for s in savings(subject, settings, count=99, without=barred)}
    assert offered - left == {"offload=true", "host_embedding=true"}
