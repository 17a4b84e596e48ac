"""Steps as graphs: padded batches, gradients that stay, and the same run as kernel by kernel."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, TrainingArguments

from loftq.lab.compare.recipe import load_recipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows
from loftq.tasks import train_task
from loftq.tasks.trainer import TaskTrainer
from loftq.train.errors import TrainError
from loftq.train.graphs import EAGER, Rounded, StepGraphs, why_not
from tolerances import FLOAT32_SOLVE

RUN = {
    "max_steps": 12, "eval_steps": 12, "batch_size": 4, "gradient_accumulation": 2, "samples": 0,
    "max_length": 128, "holdout": 0.4, "learning_rate": 1e-2, "rank": 4, "bits": 2,
    "format": "nf2-g16",
}  # fmt: skip


@pytest.mark.parametrize(("width", "padded"), [(1, 8), (8, 8), (9, 16), (25, 30), (30, 30)])
def test_batches_are_padded_to_a_quarter_of_the_longest(width: int, padded: int) -> None:
    def collate(features: object) -> dict[str, torch.Tensor]:
        ids = torch.ones((2, width), dtype=torch.int64)
        return {"input_ids": ids, "labels": torch.tensor([3.0, 4.0])}

    batch = Rounded(collate, 30, {"input_ids": 7, "labels": -100})([])
    assert batch["input_ids"].shape == (2, padded)
    assert batch["input_ids"][:, width:].eq(7).all()
    assert batch["input_ids"][:, :width].eq(1).all()
    assert batch["labels"].tolist() == [3.0, 4.0]


def test_answers_to_choose_from_are_padded_as_rows_are() -> None:
    def collate(features: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones((2, 3, 9), dtype=torch.int64), "labels": torch.ones(2)}

    batch = Rounded(collate, 30, {"input_ids": 7, "labels": -100})([])
    assert batch["input_ids"].shape == (2, 3, 16)
    assert batch["input_ids"][..., 9:].eq(7).all()
    assert batch["labels"].shape == (2,)


def test_gradients_stay_where_they_lie_and_start_from_zero() -> None:
    layer = nn.Linear(2, 1, bias=False)
    graphs = StepGraphs(layer.parameters())

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = layer(batch["x"]).sum()
        loss.backward()
        return loss.detach()

    first = {"x": torch.tensor([[1.0, 2.0]])}
    graphs(step, first)
    assert layer.weight.grad is graphs.gradients[0]
    other = {"x": torch.tensor([[1.0, 2.0], [1.0, 1.0]])}  # another shape: never captured here
    graphs(step, other)
    assert layer.weight.grad.tolist() == [[3.0, 5.0]]
    layer.zero_grad(set_to_none=True)
    graphs(step, first)
    assert layer.weight.grad is graphs.gradients[0]
    assert layer.weight.grad.tolist() == [[1.0, 2.0]]


def test_a_cpu_refuses_with_the_remedy(tmp_path: Path) -> None:
    model = tiny(load_recipe("glue-mpnet").architecture, tmp_path / "model", words())
    data = write_rows(["rte"], tmp_path / "data")
    options = {**RUN, "graphs": True, "dtype": "fp32"}
    with pytest.raises(TrainError, match=r"graphs are a CUDA feature\. Leave it out"):
        train_task(model, "rte", tmp_path / "run", data=data, device="cpu", **options)


class _Replayed:
    """In place of a graph on a CPU, of a step that gives the same loss for every batch."""

    def __init__(self, step: Callable, batch: dict[str, torch.Tensor]) -> None:
        self.step, self.loss = step, step(dict(batch))

    def replay(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        now = self.step(dict(batch))
        assert torch.equal(now, self.loss), "a graph would repeat the loss of its capture"
        return now


def _trainer(tmp_path: Path, rows: int) -> TaskTrainer:
    """Of a mean of outputs, batches of one row, two of them a step."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * input_ids).sum()}

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
        num_train_epochs=2, learning_rate=0.0, report_to=[], save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": torch.ones(2)} for _ in range(rows)]
    return TaskTrainer(model=Model(), args=arguments, train_dataset=data)


def test_a_shorter_accumulation_at_the_end_of_an_epoch_is_another_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its loss is divided by fewer batches: 2 + 2 + 1 in each of two epochs."""
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, step, batch: _Replayed(step, batch))
    trainer = _trainer(tmp_path, rows=5)
    trainer.graphs = StepGraphs(trainer.model.parameters())
    trainer.train()
    assert trainer.graphs.told == {"captured": 1, "replayed": 6, "eager": 4}


def test_what_went_on_kernel_by_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, step, batch: _Replayed(step, batch))
    graphs = StepGraphs(nn.Linear(2, 1).parameters())
    for width in [1, 1, 1, 1, 2]:
        graphs(lambda batch: batch["x"].sum(), {"x": torch.ones(width)})
    assert graphs.told == {"captured": 1, "replayed": 2, "eager": 3}


CUDA = torch.device("cuda")  # named, not used


def _why_not(architecture: dict, *, checkpointing: bool) -> str:
    model = AutoModel.from_config(AutoConfig.for_model(**architecture))
    return why_not(model, CUDA, processes=1, dtype="bf16", checkpointing=checkpointing)


def test_dropout_without_a_module_of_its_own_is_seen() -> None:
    """BART's and Llama's attention drop by a number in a call: it must not be drawn twice."""
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    llama = {"model_type": "llama", **small}
    assert _why_not(llama, checkpointing=True) == ""
    assert "drop other values" in _why_not(llama | {"attention_dropout": 0.1}, checkpointing=True)
    assert _why_not(llama | {"attention_dropout": 0.1}, checkpointing=False) == ""


def test_layers_that_are_skipped_by_chance_are_refused() -> None:
    bart = {"model_type": "bart", "vocab_size": 40, "d_model": 16, "encoder_layers": 1,
            "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    assert _why_not(bart, checkpointing=False) == ""
    assert "drop other values" in _why_not(bart, checkpointing=True)
    skipping = _why_not(bart | {"encoder_layerdrop": 0.1}, checkpointing=False)
    assert skipping == "layerdrop skips other layers at every step"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("recipe", "task"), [("glue-mpnet", "rte"), ("smollm2-gsm8k", "gsm8k-loss")]
)
def test_a_run_of_graphs_is_the_run_without(recipe: str, task: str, tmp_path: Path) -> None:
    """Dropout aside: a graph draws its random numbers in another order."""
    architecture = load_recipe(recipe).architecture
    model = tiny(architecture, tmp_path / "model", words())
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    data, losses = write_rows([task], tmp_path / "data"), {}
    for graphs in (False, True):
        run = tmp_path / f"run-{graphs}"
        options = {**RUN, "graphs": graphs, "checkpointing": False}
        train_task(model, task, run, data=data, device="cuda", cache=tmp_path / "cache", **options)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[graphs] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses[True]) == RUN["max_steps"] > EAGER
    assert losses[True][-1] != losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


def test_without_accumulation_gradients_are_left_to_the_backward_until_a_graph_makes_them() -> None:
    layer = nn.Linear(2, 1, bias=False)
    graphs = StepGraphs(layer.parameters(), accumulates=False)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = layer(batch["x"]).sum()
        loss.backward()
        return loss.detach()

    batch = {"x": torch.tensor([[1.0, 2.0]])}
    graphs(step, batch)
    assert graphs.gradients == [None]
    assert layer.weight.grad.tolist() == [[1.0, 2.0]]
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) between steps, or .* accumulates"):
        graphs(step, batch)


def _stack(graphs_of: Callable) -> tuple[nn.ModuleList, StepGraphs, Callable]:
    """Eight layers, the last of them left out for an odd number of rows, and their step."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8)).cuda()

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"]
        for layer in layers[: len(layers) - len(x) % 2]:
            x = layer(x).tanh()
        loss = x.square().mean()
        loss.backward()
        return loss.detach()

    return layers, graphs_of(layers.parameters()), step


@pytest.mark.gpu
def test_a_graph_makes_gradients_and_later_ones_add_to_them() -> None:
    layers, graphs, step = _stack(partial(StepGraphs, accumulates=False))
    for rows in [511, 511, 511, 2048, 2048, 2048, 511, 2048, 511]:
        batch = {"x": torch.randn(rows, 512, device="cuda")}
        layers.zero_grad(set_to_none=True)
        wanted_loss = step(batch)
        wanted = [None if p.grad is None else p.grad.clone() for p in layers.parameters()]
        layers.zero_grad(set_to_none=True)
        torch.testing.assert_close(graphs(step, batch), wanted_loss)
        for parameter, gradient in zip(layers.parameters(), wanted, strict=True):
            if gradient is not None:
                assert (parameter.grad - gradient).norm() <= FLOAT32_SOLVE * gradient.norm()
            else:
                assert parameter.grad is None or not parameter.grad.any()
    assert graphs.told == {"captured": 2, "replayed": 5, "eager": 4}


@pytest.mark.gpu
def test_gradients_that_a_graph_makes_do_not_stand_beside_what_its_forward_keeps() -> None:
    peaks = []
    for accumulates in (True, True, False):  # the first capture takes a workspace that stays
        layers, graphs, step = _stack(partial(StepGraphs, accumulates=accumulates))
        batch = {"x": torch.randn(4096, 512, device="cuda")}
        for _ in range(EAGER):
            layers.zero_grad(set_to_none=True)
            graphs(step, batch)
        layers.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graphs(step, batch)
        held = sum(p.nbytes for p in layers.parameters()) if accumulates else 0
        peaks.append(torch.cuda.max_memory_allocated() - before + held)
    size = sum(p.nbytes for p in layers.parameters())
    assert peaks[1] - peaks[2] >= size / 2


@pytest.mark.gpu
def test_captured_steps_add_the_gradients_of_eager_ones() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).cuda()
    graphs = StepGraphs(layer.parameters())

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = layer(batch["x"]).square().mean()
        loss.backward()
        return loss.detach()

    for i in range(EAGER + 4):
        x = torch.randn(3, 8, device="cuda")
        layer.zero_grad(set_to_none=True)
        wanted_loss = step({"x": x})
        wanted = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad(set_to_none=True)
        loss = graphs(step, {"x": x})
        assert bool(graphs.captured) == (i >= EAGER)
        torch.testing.assert_close(loss, wanted_loss)
        torch.testing.assert_close([p.grad for p in layer.parameters()], wanted)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_host_is_refused() -> None:
    layer = nn.Linear(8, 1).cuda()
    graphs = StepGraphs(layer.parameters())

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = layer(batch["x"]).mean()
        loss.backward()
        return loss.detach() * (2.0 if loss.item() > 0 else 1.0)

    batch = {"x": torch.randn(3, 8, device="cuda")}
    for _ in range(EAGER):
        graphs(step, batch)
    with pytest.raises(TrainError, match=r"cannot be captured .* graphs=false"):
        graphs(step, batch)
