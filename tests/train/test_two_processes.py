"""Training under a launcher: one folder, one adapter, the batch split over the processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_chat
from loftq.integrations.metrics import read_metrics


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    train: Callable, out: Path, chats: Path, tmp_path: Path
) -> None:
    tiny_chat.write_chats(chats, rows=17)  # 16 to train: whole batches, so that no row is repeated
    words = ["max_length=48", "chat_template=chatml", "sample_tokens=4", "max_steps=3",
             "learning_rate=0.01", "report=false", "batch_size=4", "gradient_accumulation=1",
             "--device", "cpu", "--json"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "loftq", "train", out, "--data", chats, "-o", tmp_path / "two", *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["summary"]["steps"] == 3  # one process speaks
    options = {"max_steps": 3, "learning_rate": 0.01, "batch_size": 8, "gradient_accumulation": 1}
    train(out, chats, tmp_path / "one", **options)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in two.train] == pytest.approx(
        [row["loss"] for row in one.train], abs=2e-4
    )
    assert len((tmp_path / "two/metrics.jsonl").read_text().splitlines()) == len(
        (tmp_path / "one/metrics.jsonl").read_text().splitlines()
    )
