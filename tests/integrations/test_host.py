"""The embedding on the host: same rows, never moved, saved as before, trained through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import loftq
import zoo
from loftq.integrations.host import HostTable, keep_on_host_, one_device


@pytest.fixture(params=[16, 8])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A packed tiny Llama, its embedding dense and packed."""
    source = zoo.save(zoo.build("llama"), tmp_path / "source")
    loftq.quantize(source, tmp_path / "out", rank=4, device="cpu", embedding=request.param)
    return tmp_path / "out"


def test_rows_and_gradients_are_the_same(out: Path) -> None:
    ids = zoo.tokens()
    losses, gradients = [], []
    for place in ("device", "host"):
        model = loftq.load(out, trainable=True, embedding=place)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_whoever_reads_inputs_embeds(out: Path, reentrant: bool) -> None:
    model = loftq.load(out, trainable=True, embedding="host")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model.enable_input_require_grads()
    seen: list[torch.Tensor] = []
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, rows: rows.retain_grad() or seen.append(rows))
    model(input_ids=zoo.tokens(), labels=zoo.tokens(), use_cache=False).loss.backward()
    assert seen[0].grad is not None
    assert seen[0].grad.abs().sum() > 0


def test_the_table_stays_wherever_the_model_goes(out: Path) -> None:
    model = loftq.load(out, embedding="host")
    table = model.get_base_model().get_input_embeddings()
    assert isinstance(table, HostTable)
    assert isinstance(table, nn.Embedding)
    assert not list(table.parameters())
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    assert all(tensor.device.type == "cpu" for tensor in table.tables().values())
    assert table(zoo.tokens()).is_meta


def test_casts_reach_the_rows(out: Path) -> None:
    model = loftq.load(out, embedding="host").to(torch.bfloat16)
    assert model.get_base_model().get_input_embeddings()(zoo.tokens()).dtype == torch.bfloat16


def test_state_dict_and_a_saved_copy_hold_the_table(out: Path, tmp_path: Path) -> None:
    base = loftq.load(out, embedding="host").unload()
    plain = loftq.load(out).unload()
    assert base.state_dict().keys() == plain.state_dict().keys()
    base.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(zoo.tokens()).logits, plain(zoo.tokens()).logits)
    state = {name: torch.zeros_like(tensor) for name, tensor in base.state_dict().items()}
    base.load_state_dict(state)
    assert not any(t.any() for t in base.get_input_embeddings().tables().values())


def test_a_second_call_changes_nothing(out: Path) -> None:
    base = loftq.load(out, embedding="host").get_base_model()
    assert keep_on_host_(base) is base.get_input_embeddings()


def test_a_shared_table_is_refused(tmp_path: Path) -> None:
    source = zoo.save(zoo.build("llama-tied"), tmp_path / "source")
    for bits in (8, 16):
        loftq.quantize(source, tmp_path / f"out{bits}", rank=4, device="cpu", embedding=bits)
        with pytest.raises(ValueError, match="the head shares the table"):
            loftq.load(tmp_path / f"out{bits}", embedding="host")


def test_foreign_tables_and_places_are_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="choose one of device, host"):
        loftq.load(out, embedding="disk")
    model = zoo.build("gemma2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="Gemma2TextScaledWordEmbedding"):
        keep_on_host_(model)


@pytest.mark.parametrize("spread", ["auto", {"a": 0, "b": 1}])
def test_a_spread_model_is_refused(spread: object) -> None:
    with pytest.raises(ValueError, match="needs one device"):
        one_device(spread)


def test_one_device_is_understood() -> None:
    assert one_device(None) is None
    assert one_device("cpu") == one_device({"": "cpu"}) == torch.device("cpu")


@pytest.mark.gpu
def test_only_rows_are_on_the_gpu(out: Path) -> None:
    model = loftq.load(out, trainable=True, embedding="host", device_map="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    ids = zoo.tokens().cuda()
    model(input_ids=ids, labels=ids).loss.backward()
