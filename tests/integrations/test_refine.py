"""Refined methods from a folder to a folder: what falls, what resumes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loftq
import zoo
from loftq.calibration import TokenWindows
from loftq.integrations import refine
from loftq.integrations.blocks import CheckpointBlocks
from loftq.integrations.refine import Step, refine_adapter
from loftq.integrations.refine.natural import _Block
from loftq.integrations.refine.passage import Passage
from loftq.integrations.refine.sitting import Sitting
from loftq.integrations.refine.student import Student, pieces_of
from loftq.methods import METHODS
from loftq.refine import find_refinement
from loftq.report import inspect_output
from test_calibrated import OPTIONS, add_tokenizer

ADAPTER = "init_adapter/adapter_model.safetensors"
BOTH = "block-distill"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random text, and a cache of its own."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (40, 60), generator=generator)
    rows = ["".join(chr(97 + int(i)) for i in row[: 20 + k]) for k, row in enumerate(letters)]
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "some.jsonl").write_text(text)
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "cache"))
    return tmp_path


def quantize(place: Path, output: str, *, model: str = "llama", **options: object) -> dict:
    """loftq.json of a new output."""
    if not (place / model).exists():
        zoo.save(zoo.build(model), place / model)
        add_tokenizer(place / model)
    given = {**OPTIONS, "data": str(place / "some.jsonl"), **options}
    loftq.quantize(place / model, place / output, **given)
    return json.loads((place / output / "loftq.json").read_text())


def adapter(place: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(place / output / ADAPTER)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        *(("llama", method) for method in ("max", "apiq-lw", "apiq-bw", "rilq")),
        *((model, "max") for model in ("bert", "t5", "gpt2")),
        ("gpt2", "apiq-lw"),
    ],
)
def test_held_out_losses_fall_and_the_folder_verifies(model: str, method: str, place: Path) -> None:
    record = quantize(place, "out", model=model, method=method)
    stages = record["refinement"]
    assert [stage["scope"] for stage in stages] == [
        stage.scope for stage in find_refinement(row_of(method)).stages
    ]
    for stage in stages:
        assert all(unit["best"] <= unit["start"] for unit in stage["units"])
        assert sum(u["best"] for u in stage["units"]) < sum(u["start"] for u in stage["units"])
    assert all(f"refined: {row_of(method)}" in layer["notes"] for layer in record["layers"])
    assert not (place / "out/.loftq-refine").exists()
    assert inspect_output(place / "out", True, place / model).problems == []
    assert loftq.load(place / "out") is not None


@pytest.mark.parametrize(("model", "count"), [("llama", 2), ("bert", 2), ("gpt2", 2), ("t5", 4)])
def test_natural_steps_lower_the_held_out_loss_block_after_block(
    model: str, count: int, place: Path
) -> None:
    chosen = {"method": "loftq", "refine": "natural", "alpha": 8}
    record = quantize(place, "out", model=model, **chosen)
    (stage,) = record["refinement"]
    starts = [unit["start"] for unit in stage["units"]]
    assert len(starts) == count
    assert stage["units"][-1]["best"] < starts[0]
    for unit, following in zip(stage["units"], starts[1:], strict=False):
        assert unit["best"] == pytest.approx(following, rel=1e-5)
    assert inspect_output(place / "out", True, place / model).problems == []
    again = quantize(place, "again", model=model, **chosen)
    assert again["refinement"] == record["refinement"]


def test_what_a_natural_step_measures_is_the_gradient_of_the_loss(place: Path) -> None:
    """dloss/dB = s G A^T and dloss/dA = s B^T G, of this block's layers and of no others."""
    quantize(place, "out", method="loftq", alpha=8)
    student = Student(loftq.load(place / "out", trainable=True), torch.device("cpu"))
    block, others = student.blocks[1], student.adapter(student.blocks[0])
    ids = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss(number: int) -> torch.Tensor:
        return student.module(input_ids=ids[number : number + 1], labels=ids[:1]).loss

    measured = _Block(student, block, 0.3, loss, ((0, 1), (1,)))
    known = measured.measure()
    assert all(p.grad is None and p.requires_grad for p in student.adapter().values())
    ((loss(0) + loss(1)) / 2).backward()
    for path, layer in measured.layers.items():
        A, B, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0
        G = known[path].G
        torch.testing.assert_close(B.grad, scaling * G @ A.detach().mT, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(A.grad, scaling * B.detach().mT @ G, rtol=1e-3, atol=1e-7)
        assert known[path].tokens in (22, 24)  # no loss reads the last token's own outputs
    assert all(p.grad is not None for p in others.values())


def row_of(method: str) -> str:
    """Name of the refinement of a method."""
    return METHODS[method].refinement


def test_only_the_adapter_moves(place: Path) -> None:
    start = quantize(place, "start", method="max", refine="none")
    done = quantize(place, "done", method="max")
    assert start["backbone"] == done["backbone"]
    before, after = adapter(place, "start"), adapter(place, "done")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    packed = "loftq-00001-of-00001.safetensors"
    assert (place / "start" / packed).read_bytes() == (place / "done" / packed).read_bytes()
    changed = {name for name in start["tensors"] if start["tensors"][name] != done["tensors"][name]}
    assert changed == set(before)


@pytest.mark.parametrize("refine_by", ["distill", "natural"])
def test_no_pass_gives_the_start(refine_by: str, place: Path) -> None:
    quantize(place, "start", method="fast")
    quantize(place, "same", method="max", refine=refine_by, refine_epochs=0)
    assert (place / "start" / ADAPTER).read_bytes() == (place / "same" / ADAPTER).read_bytes()


def test_any_method_can_be_refined(place: Path) -> None:
    record = quantize(place, "out", method="loftq", refine="distill")
    assert record["calibration"]["kind"] == "diagonal"
    assert len(record["refinement"]) == 1
    with pytest.raises(ValueError, match=r"refine=distill: needs text to calibrate on"):
        quantize(place, "other", method="loftq", refine="distill", data=None)


@pytest.mark.parametrize("calls", [1, 4])
def test_an_interrupted_refinement_ends_in_the_same_bytes(
    calls: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first block, and after the second pass through the whole model."""
    quantize(place, "whole", method="fast", refine=BOTH)
    real, seen = Sitting._write, []

    def stopping(self: Sitting, name: str, value: object) -> None:
        real(self, name, value)
        seen.append(name)
        if len(seen) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sitting, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(place, "out", method="fast", refine=BOTH)
    monkeypatch.undo()
    monkeypatch.setenv("LOFTQ_CACHE", str(place / "cache"))
    with pytest.warns(UserWarning, match="its refinement was interrupted"):
        loftq.load(place / "out")
    with pytest.raises(ValueError, match="holds a finished model"):
        quantize(place, "out", method="fast", refine=BOTH, rank=2)
    record = quantize(place, "out", method="fast", refine=BOTH)
    assert (place / "out" / ADAPTER).read_bytes() == (place / "whole" / ADAPTER).read_bytes()
    whole = json.loads((place / "whole/loftq.json").read_text())
    assert record == whole
    assert not (place / "out/.loftq-refine").exists()


def test_progress_counts_units_and_tells_the_time_left(place: Path) -> None:
    steps: list[Step] = []
    quantize(place, "out", method="fast", refine=BOTH, on_refine=steps.append)
    blocks = [step for step in steps if step.scope == "block"]
    assert {step.units for step in blocks} == {2}
    assert max(step.done for step in blocks) == 2
    assert steps[-1].scope == "model"
    assert steps[-1].seconds_left == 0
    assert all(step.loss is not None and step.seconds_left is not None for step in steps)


def test_a_loaded_model_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"method=max: a refinement reads the original weights"):
        loftq.quantize_model(
            zoo.build("llama"), method="max", data=str(place / "some.jsonl"), **OPTIONS
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "max", "data": None}, r"method=max: needs text to calibrate on"),
        ({"refine": "blocks"}, "refine='blocks' does not exist"),
        ({"refine_epochs": -1.0}, "refine_epochs=-1.0: must be 0"),
        ({"refine": "natural", "refine_epochs": 0.4}, "refine_epochs=0.4: .* a whole number"),
        ({"refine": "natural", "method": "qlora"}, "qlora with iters=0 starts at B A = 0"),
        ({"refine": "natural", "iters": 0}, "with iters=0 starts at B A = 0"),
    ],
)
def test_what_cannot_be_refined_is_refused(options: dict, message: str, place: Path) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(place, "out", **options)
    assert not (place / "out").exists()


def test_one_window_is_too_little_text(place: Path) -> None:
    with (
        pytest.warns(UserWarning, match="fewer than"),
        pytest.raises(ValueError, match="1 window, and one is held out"),
    ):
        quantize(place, "out", method="max", calibration_windows=1)


def test_blocks_that_share_weights_are_refined_as_a_whole_only(place: Path) -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.AlbertConfig(
        vocab_size=97, embedding_size=48, hidden_size=48, intermediate_size=75,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    zoo.save(hf.AlbertModel(config).eval(), place / "albert")
    add_tokenizer(place / "albert")
    with pytest.raises(ValueError, match=r"layers share their weights.*refine=distill"):
        quantize(place, "out", model="albert", method="loftq", refine="block")
    record = quantize(place, "whole", model="albert", method="loftq", refine="distill")
    (unit,) = record["refinement"][0]["units"]
    assert unit["best"] < unit["start"]


def test_a_passage_gives_what_the_model_gives(place: Path) -> None:
    """Block by block, and called by itself, a forward is the model's own."""
    zoo.save(zoo.build("llama"), place / "llama")
    model = zoo.build("llama")
    source = loftq.api.open_checkpoint(place / "llama")
    ids = torch.randint(5, 80, (6, 9), generator=torch.Generator().manual_seed(0))
    pieces, (learned, held) = pieces_of(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    assert (list(learned), list(held)) == ([0, 1], [2])
    expected = model.model(ids, output_hidden_states=True).hidden_states
    with Passage(CheckpointBlocks(place / "llama", source, torch.device("cpu")), pieces) as way:
        assert way.at == "model.layers.0"
        torch.testing.assert_close(way.block(1), expected[1][2:4])
        torch.testing.assert_close(way.block(1), expected[1][2:4])
        way.finish()
        torch.testing.assert_close(way.last_hidden(2), expected[-1][4:])


def test_gradients_reach_the_factors_alone_and_blocks_remember_little_with_the_same_result(
    place: Path,
) -> None:
    quantize(place, "out", method="fast")
    student = Student(loftq.load(place / "out", trainable=True), torch.device("cpu"))
    ids = torch.randint(5, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for short in (False, True):
        with student._remembering_little(short):
            student.forward(ids, torch.ones_like(ids)).last_hidden_state.sum().backward()
        taking = {n: p.grad for n, p in student.module.named_parameters() if p.grad is not None}
        assert taking.keys() == student.adapter().keys()
        found.append({name: gradient.clone() for name, gradient in taking.items()})
        student.module.zero_grad(set_to_none=True)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_the_api_serves_an_adapter_in_memory(place: Path) -> None:
    """refine_adapter works on a loaded model and leaves the folder alone."""
    quantize(place, "out", method="fast")
    before = (place / "out" / ADAPTER).read_bytes()
    ids = torch.randint(5, 80, (8, 16), generator=torch.Generator().manual_seed(0))
    windows = TokenWindows(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), source="random")
    source = loftq.api.open_checkpoint(place / "llama")
    rows = refine_adapter(
        loftq.load(place / "out", trainable=True),
        find_refinement("distill"),
        windows,
        lambda: CheckpointBlocks(place / "llama", source, torch.device("cpu")),
        state=place / "state",
        device=torch.device("cpu"),
    )
    (unit,) = rows[0]["units"]
    assert unit["best"] < unit["start"]
    assert (place / "out" / ADAPTER).read_bytes() == before
    assert not refine.is_pending(place / "out", None)  # type: ignore[arg-type]
