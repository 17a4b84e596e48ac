"""Training held near its start: the divergence by hand, and its pull on a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import kl_div
from transformers.modeling_outputs import CausalLMOutput, QuestionAnsweringModelOutput

import loftq
from loftq.integrations.metrics import read_metrics
from loftq.lab.compare.recipe import load_recipe
from loftq.lab.compare.standin import tiny
from loftq.lab.compare.standin_rows import words, write_rows
from loftq.tasks import train_task
from loftq.tasks.anchor import divergence


def test_divergence_of_a_decoder_is_over_the_tokens_that_are_learnt() -> None:
    draw = torch.Generator().manual_seed(0)
    now, then = torch.randn(2, 2, 4, 7, generator=draw)
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 1, -100, -100]])
    outputs = [CausalLMOutput(logits=logits) for logits in (now, then)]
    total, count = divergence(*outputs, labels, shift=1)
    places = [(0, 1), (0, 2), (1, 0)]  # each predicts the label one place ahead
    wanted = sum(
        kl_div(then[p].log_softmax(-1), now[p].log_softmax(-1), reduction="sum", log_target=True)
        for p in places
    )
    assert count == 3
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)
    assert float(divergence(outputs[0], outputs[0], labels, shift=0)[0]) == 0


def test_divergence_of_spans_counts_both_ends() -> None:
    ends = {"start_logits": torch.randn(3, 5), "end_logits": torch.randn(3, 5)}
    spans = QuestionAnsweringModelOutput(**ends)
    assert divergence(spans, spans, None, shift=1)[1] == 6


LITTLE = {
    "max_steps": 8, "eval_steps": 8, "batch_size": 4, "gradient_accumulation": 1, "samples": 0,
    "max_length": 128, "holdout": 0.4, "dtype": "fp32", "learning_rate": 2e-2, "rank": 4, "bits": 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("recipe", "task"), [("glue-mpnet", "rte"), ("smollm2-gsm8k", "gsm8k-loss")]
)
def test_a_heavy_term_holds_the_run_at_its_start(recipe: str, task: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    model = tiny(load_recipe(recipe).architecture, tmp_path / "model", words())
    data, out = write_rows([task], tmp_path / "data"), {}
    for kl in (0.0, 1e3):
        run = tmp_path / f"run-{kl}"
        out[kl] = SimpleNamespace(
            path=run,
            result=train_task(
                model, task, run, data=data, device="cpu", cache=tmp_path / "cache", kl=kl, **LITTLE
            ),
        )
    names = sorted(path.name for path in (out[1e3].path / "adapter").iterdir())
    assert names == sorted(path.name for path in (out[0.0].path / "adapter").iterdir())
    sizes = [json.loads((found.path / "task.json").read_text())["bytes"] for found in out.values()]
    assert sizes[0] == sizes[1]
    assert moved(out[1e3].path, tmp_path) < 0.2 * moved(out[0.0].path, tmp_path)


def moved(run: Path, work: Path) -> float:
    """Largest change of a predicted probability or loss from the start's."""

    file = next(run.glob("predictions-*.jsonl"))
    found = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    if "probabilities" in found[0]:
        return max(abs(row["probabilities"][0] - 0.5) for row in found)
    start = work / "start"
    if not start.is_dir():
        train = {**LITTLE, "learning_rate": 1e-12, "max_steps": 1, "eval_steps": 1}
        cache, data = work / "cache", work / "data"
        train_task(
            work / "model", "gsm8k-loss", start, data=data, device="cpu", cache=cache, **train
        )
    before = [
        json.loads(line)["prediction"]
        for line in next(start.glob("predictions-*.jsonl")).read_text().splitlines()
    ]
    pairs = zip(found, before, strict=True)
    return max(abs(a["nats"] / a["tokens"] - b["nats"] / b["tokens"]) for a, b in pairs)


@pytest.mark.slow
def test_two_processes_are_held_as_one_is(tmp_path: Path) -> None:
    """Rows of unequal length: a token counts the same, whichever process has it."""
    pytest.importorskip("datasets")
    model = tiny(load_recipe("smollm2-gsm8k").architecture, tmp_path / "model", words())
    data = write_rows(["gsm8k-loss"], tmp_path / "data")
    options = {
        **LITTLE,
        "max_steps": 6,
        "eval_steps": 6,
        "learning_rate": 5e-2,
        "train_rows": 12,
        "kl": 20.0,
    }
    loftq.quantize(model, tmp_path / "out", bits=2, rank=4, device="cpu")
    keys = {**options, "batch_size": 2}
    del keys["rank"], keys["bits"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "loftq", "train", tmp_path / "out", "--task", "gsm8k-loss", "-o", tmp_path / "two",
         "--device", "cpu", *(f"{key}={value}" for key, value in keys.items())],
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOFTQ_DATA": str(data)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    keys["batch_size"] = 4
    for name, kl in (("one", options["kl"]), ("free", 0.0)):
        train_task(
            tmp_path / "out", "gsm8k-loss", tmp_path / name, data=data, device="cpu",
            **{**keys, "kl": kl},
        )  # fmt: skip
    one, two, free = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl").train]
        for name in ("one", "two", "free")
    )
    assert two == pytest.approx(one, abs=2e-4)
    assert max(abs(a - b) for a, b in zip(one, free, strict=True)) > 2e-2, "the term is not felt"
