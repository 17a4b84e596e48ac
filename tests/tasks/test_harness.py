"""Our loaded model in lm-evaluation-harness, on a task of files, and without the package."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loftq.tasks import TaskError
from loftq.tasks.harness import run_harness

TASK = """
task: tiny_cats
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" cat", " dog"]
doc_to_target: label
metric_list:
  - metric: acc
"""


def test_without_the_package_the_extra_is_named(
    model_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq.tasks import harness

    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"needs lm-eval: pip install 'loftq\[harness\]'"):
        run_harness(model_of("llama"), ["arc_easy"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_packed_model_is_scored_on_tasks_of_files(
    model_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loftq

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"a cat or a dog {i}?", "label": i % 2} for i in range(8)]
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny_cats.yaml").write_text(TASK.format(file=file))
    loftq.quantize(model_of("llama"), tmp_path / "out", bits=2, rank=2, device="cpu")
    found = run_harness(
        tmp_path / "out", ["tiny_cats"], include=tmp_path / "tasks", limit=6, device="cpu"
    )
    value, error = found.metrics["tiny_cats"]["acc"]
    assert 0 <= value <= 1
    assert error is not None
    assert (found.adapter, found.shots["tiny_cats"]) == ("init_adapter", 0)
    with pytest.raises(TaskError, match="knows no task nosuchtask"):
        run_harness(tmp_path / "out", ["nosuchtask"], device="cpu")
