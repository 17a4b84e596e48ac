"""Calibrated quantization end to end: from a text file to a folder that loads, and refusals."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loftq
import zoo
from loftq.integrations import blocks as model_blocks
from loftq.integrations.calibrate import windows_at_once
from loftq.pipeline import stream as engine
from loftq.report import inspect_output

METHODS = (
    "lqer", "qera-approx", "qera-exact", "cloq", "fast",
    "quailora", "eora", "projq", "srr", "corda", "caldera",
)  # fmt: skip
OPTIONS = {"format": "int2-g32-dq", "rank": 4, "calibration_windows": 20, "calibration_context": 32}


def add_tokenizer(folder: Path) -> None:
    """One id for each letter, within the vocabulary of the zoo's models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(
        models.WordLevel({chr(97 + i): 5 + 3 * i for i in range(26)} | {"?": 3}, unk_token="?")
    )
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="?", pad_token="?", model_max_length=48
    ).save_pretrained(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama and BERT with tokenizers, some text, and a cache of its own."""
    for name in ("llama", "bert"):
        zoo.save(zoo.build(name), tmp_path / name)
        add_tokenizer(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    rows = [
        "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (8 + 2 * k,), generator=generator))
        for k in range(40)
    ]
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "some.jsonl").write_text(text)
    (tmp_path / "other.txt").write_text(rows[-1] * 40)
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "cache"))
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file but those that hold times or paths."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix == ".safetensors"
    }


def quantize(place: Path, output: str, *, model: str = "llama", **options: object) -> dict:
    data = str(place / "some.jsonl")
    loftq.quantize(place / model, place / output, **{**OPTIONS, "data": data, **options})
    return json.loads((place / output / "loftq.json").read_text())


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_serves_decoders_and_encoders(name: str, model: str, place: Path) -> None:
    record = quantize(place, "out", model=model, method=name)
    assert record["calibration"]["source"] == "some.jsonl"
    for layer in record["layers"]:
        assert layer["method"] == name
        assert layer["tokens"] == record["calibration"]["tokens"]
        assert layer["output_error"] < layer["plain_output_error"]
    report = inspect_output(place / "out", True, place / model)
    assert report.problems == []  # hashes, lineage, and each error recomputed from the files
    assert loftq.load(place / "out") is not None


def test_gradients_weigh_where_a_next_token_is_predicted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = quantize(place, "out", method="lq-lora")
    for layer in record["layers"]:
        assert layer["errors"][layer["kept"] - 1] == min(layer["errors"])
    assert inspect_output(place / "out", True, place / "llama").problems == []
    monkeypatch.setattr("loftq.api._whole", None)  # the means are kept
    quantize(place, "again", method="lq-lora")
    assert contents(place / "again") == contents(place / "out")
    with pytest.raises(ValueError, match="weighs by gradients of the next token's loss"):
        quantize(place, "bert-out", model="bert", method="lq-lora")


def test_padding_of_an_encoder_is_not_counted(place: Path) -> None:
    record = quantize(place, "out", model="bert", method="qera-approx")
    rows = (place / "some.jsonl").read_text().splitlines()[: OPTIONS["calibration_windows"]]
    lengths = [min(len(json.loads(row)["text"]), OPTIONS["calibration_context"]) for row in rows]
    assert record["calibration"]["tokens"] == sum(lengths)
    assert record["calibration"]["windows"] * record["calibration"]["context"] > sum(lengths)


def test_statistics_are_taken_once_for_all_methods_and_widths(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(place, "first", method="qera-exact")

    def never(*_: object) -> None:
        raise AssertionError("the model was opened again")

    monkeypatch.setattr(model_blocks.CheckpointBlocks, "__init__", never)
    quantize(place, "second", method="cloq", format="nf3-g32-f16", rank=2)
    quantize(place, "third", method="qera-approx")
    with pytest.raises(AssertionError, match="opened again"):
        quantize(place, "fourth", method="cloq", data=str(place / "other.txt"))


def test_a_run_resumes_byte_for_byte_with_or_without_kept_statistics(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(place, "whole", method="cloq")
    solved, real = [], engine.solve_batch

    def interrupted(*args: object) -> object:
        if len(solved) == 1:
            raise KeyboardInterrupt
        solved.append(1)
        return real(*args)

    for name, keep in (("kept", True), ("taken-again", False)):
        solved.clear()
        monkeypatch.setattr(engine, "solve_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(place, name, method="cloq")
        monkeypatch.setattr(engine, "solve_batch", real)
        if not keep:
            for file in (place / "cache").rglob("model.layers.1.safetensors"):
                file.unlink()
        quantize(place, name, method="cloq")
        assert contents(place / name) == contents(place / "whole")


def test_an_interrupted_calibration_goes_on_after_the_blocks_it_has(place: Path) -> None:
    quantize(place, "out", method="cloq")
    files = sorted((place / "cache").rglob("*.safetensors"))
    assert [file.name for file in files] == [f"model.layers.{k}.safetensors" for k in (0, 1)]
    before = [file.read_bytes() for file in files]
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    quantize(place, "again", method="cloq")
    assert [file.read_bytes() for file in files] == before
    assert files[0].stat().st_mtime_ns == stamp


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_tables_are_rounded_without_statistics(model: str, place: Path) -> None:
    zoo.save(zoo.build(model), place / model)
    add_tokenizer(place / model)
    record = quantize(place, "out", model=model, method="cloq", embedding=8, head=8)
    tables = [layer for layer in record["layers"] if not layer["rank"]]
    assert len(tables) == (1 if model == "llama-tied" else 2)
    assert all(x["tokens"] is None and x["output_error"] is None for x in tables)
    assert all(x["tokens"] for x in record["layers"] if x["rank"])
    # Nothing was taken of the inputs of a head, which lies outside the blocks.
    names = sorted(file.name for file in (place / "cache").rglob("*.safetensors"))
    assert names == [f"model.layers.{k}.safetensors" for k in (0, 1)]
    assert inspect_output(place / "out", True, place / model).problems == []


def test_a_plan_counts_grams_where_they_are_needed(place: Path) -> None:
    chosen = {**OPTIONS, "data": str(place / "some.jsonl"), "device": "cuda", "head": 8}
    plain = loftq.plan(place / "llama", method="loftq", **chosen)
    known = loftq.plan(place / "llama", method="cloq", **chosen)
    assert (plain.solved_at_once, known.solved_at_once) == (3, 1)
    assert not any(batch.gram for batch in plain.batches)
    head = {batch.layers[0].info.module: batch for batch in known.batches}["lm_head"]
    assert [batch for batch in known.batches if not batch.gram] == [head]
    widest = max(batch.working_bytes for batch in known.batches)
    assert known.working_bytes == widest > max(batch.working_bytes for batch in plain.batches)
    assert known.seconds > plain.seconds  # one step of GPTQ, which counts six, to five of rtn


def test_data_never_changes_the_algorithm(place: Path) -> None:
    record = quantize(place, "with", method="loftq")
    quantize(place, "without", method="loftq", data=None)
    assert contents(place / "with") == contents(place / "without")
    assert record["calibration"] is None
    assert not (place / "cache").exists()


def test_a_loaded_model_gives_what_the_checkpoint_gives(place: Path) -> None:
    from transformers import AutoTokenizer

    quantize(place, "out", method="cloq")
    expected = loftq.load(place / "out").state_dict()
    model = loftq.quantize_model(
        zoo.build("llama"),
        method="cloq",
        tokenizer=AutoTokenizer.from_pretrained(place / "llama"),
        data=str(place / "some.jsonl"),
        **OPTIONS,
    )
    found = model.state_dict()
    packed = [key for key in expected if "weight_packed" in key]
    assert packed
    for key in packed:
        assert torch.equal(found[key], expected[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, r"method=cloq: needs text .* do without, unless refined: loftq, qlora"),
        ({"data": "wiki.test.raw"}, "by its name a test split"),
        ({"embeddings": True}, "an embedding has no inputs to calibrate on"),
        ({"damping": 2.0}, "damping=2.0: must lie between 0 and 1"),
        ({"calibration_windows": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    options: dict[str, object], message: str, place: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(place, "out", method="cloq", **options)
    assert not (place / "out").exists()


def test_a_loaded_model_without_tokenizer_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"pass the model's tokenizer too"):
        loftq.quantize_model(
            zoo.build("llama"), method="cloq", data=str(place / "some.jsonl"), **OPTIONS
        )


def test_fewer_tokens_than_inputs_warn_and_are_recorded_or_refused(place: Path) -> None:
    few = {"method": "cloq", "calibration_windows": 1}
    with pytest.warns(UserWarning, match="32 tokens are fewer than the 75 inputs"):
        record = quantize(place, "out", **few)
    assert all("32 tokens for a Gram of" in " ".join(x["notes"]) for x in record["layers"])
    with (
        pytest.warns(UserWarning, match="fewer"),
        pytest.raises(ValueError, match="Calibrate on more"),
    ):
        quantize(place, "strict", strict=True, **few)


def test_enough_tokens_do_not_warn(place: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantize(place, "out", method="cloq", strict=True)


def test_the_plan_says_what_calibration_takes(place: Path) -> None:
    data = str(place / "some.jsonl")
    planned = loftq.plan(place / "llama", method="fast", data=data, **OPTIONS)
    cost = planned.calibration_cost
    assert cost is not None
    assert planned.calibration is not None
    # Two blocks; q, k, v, o, gate and up are 48 wide and read three inputs, down reads 75.
    assert cost.disk_bytes == 2 * (3 * 4 * 48**2 + 4 * 75**2) // 2
    assert cost.device_bytes > 4 * 75**2
    assert planned.calibration.tokens == 20 * 32
    assert not (place / "cache").exists()
    assert loftq.plan(place / "llama", data=data, rank=4).calibration is None


def test_nothing_is_known_of_a_layer_that_no_token_reaches(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable = model_blocks.LoadedBlocks.forward

    def without_mlp(self: model_blocks.LoadedBlocks, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.module.get_submodule("model.layers.1.mlp").forward = lambda x: x
        real(self, ids, mask)

    monkeypatch.setattr(model_blocks.LoadedBlocks, "forward", without_mlp)
    with pytest.raises(ValueError, match=r"gate_proj: no calibration token reached it"):
        quantize(place, "out", method="cloq")


@pytest.mark.parametrize(
    ("free", "widest", "windows"),
    [
        (70 << 30, 1536, 28),  # a small model: as many as a few GiB take
        (70 << 30, 256, 32),
        (70 << 30, 11008, 8),
        (3 << 30, 11008, 2),  # little memory is left
        (1 << 20, 11008, 1),
    ],
)
def test_a_gpu_runs_as_many_windows_at_once_as_keep_it_busy_and_fit(
    free: int, widest: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    assert windows_at_once(torch.device("cuda"), 1024, widest) == windows
    assert windows_at_once(torch.device("cpu"), 1024, widest) == 4
