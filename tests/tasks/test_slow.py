"""What takes minutes: two processes, and real models that learn real tasks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loftq.integrations.metrics import read_metrics
from loftq.tasks import evaluate, train_task


@pytest.mark.slow
@pytest.mark.parametrize("task", ["rte", "gsm8k-loss"])
def test_two_processes_train_what_one_does(
    task: str, train: Callable, model_of: Callable, data: Path, cache: Path, tmp_path: Path
) -> None:
    model = model_of("bert" if task == "rte" else "llama")
    options: dict[str, Any] = {"max_steps": 3, "gradient_accumulation": 1, "learning_rate": 0.01}
    train(model, task, tmp_path / "one", batch_size=8, **options)
    words = [f"{key}={value}" for key, value in options.items()]
    words += ["eval_steps=1", "samples=1", "holdout=0.2", "checkpointing=false", f"cache={cache}",
              "batch_size=4", "report=false", "answer_tokens=4", "eval_batch_size=8"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "loftq", "train", model, "--task", task, "--data", data, "--bits", "2",
         "--rank", "2", "--device", "cpu", "-o", tmp_path / "two", *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for kind, key in (("train", "loss"), ("validation", "validation_loss")):
        ours, theirs = ([row[key] for row in getattr(found, kind)] for found in (two, one))
        assert ours == pytest.approx(theirs, rel=0.01), kind


@pytest.mark.slow
def test_a_packed_minilm_learns_sentence_similarity(
    models_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 80, "batch_size": 16, "max_length": 48, "learning_rate": 1e-3}
    options |= {"eval_steps": 40, "train_rows": 1280, "eval_rows": 300, "holdout": 0.03}
    places = {"data": data_dir, "cache": tmp_path / "packed", "device": "cpu"}
    model = models_dir / "minilm-l6"
    result = train_task(model, "stsb", tmp_path / "run", bits=4, **places, **options)
    (before, *_, after) = read_metrics(tmp_path / "run/metrics.jsonl").validation
    assert after["validation_loss"] < before["validation_loss"] / 3
    assert result.value > 0.6
    assert result.metrics["validation"]["spearman"]["low"] > 0.5


@pytest.mark.slow
def test_the_three_perplexities_of_a_real_model(
    models_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    found = evaluate(
        models_dir / "smollm2-135m", "wikitext2", data=data_dir, device="cpu", limit=2, batch_size=8
    )
    scores = {name: score["value"] for name, score in found.metrics["test"].items()}
    assert 10 < scores["perplexity_gptq"] < 40
    assert scores["perplexity_word"] > 1.5 * scores["perplexity_gptq"], "words have several tokens"
    json.dumps(found.to_dict())
