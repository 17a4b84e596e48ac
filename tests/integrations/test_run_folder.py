"""A run says where its backbone is, and whether it has ended."""

import json
import shutil
from pathlib import Path

import pytest

import loftq
import zoo
from loftq.integrations.peft import LineageError
from loftq.integrations.run_folder import RunError, backbone_and_adapter, open_run
from trained_run import write_run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    zoo.save(zoo.build("llama"), folder / "source")
    loftq.quantize(folder / "source", folder / "out", rank=4)
    return folder / "out"


@pytest.fixture
def run(out: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", out)


def edit(run: Path, **changes: str) -> None:
    base = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps({**base, **changes}))


def test_a_run_gives_its_backbone_and_its_trained_adapter(run: Path, out: Path) -> None:
    assert open_run(run).base().model == "org/model"
    assert backbone_and_adapter(run) == (out, run / "adapter")


def test_an_output_gives_itself_and_its_start_adapter(out: Path) -> None:
    assert backbone_and_adapter(out) == (out, out / "init_adapter")


def test_a_relative_path_starts_at_the_run(run: Path, out: Path) -> None:
    shutil.copytree(out, run / "base")
    edit(run, path="base")
    assert open_run(run).base().path == run / "base"
    assert backbone_and_adapter(run)[0] == run / "base"


def test_an_adapter_of_another_backbone_is_refused(run: Path, out: Path) -> None:
    mark = run / "adapter" / "loftq_lineage.json"
    mark.write_text(json.dumps({"version": 1, "backbone": "0" * 64}))
    with pytest.raises(LineageError, match="belongs to backbone 000000000000"):
        backbone_and_adapter(run)


def test_what_is_no_run_or_has_not_ended_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no base\.json, so not a run"):
        open_run(tmp_path)
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(RunError, match="the run has not ended"):
        open_run(run)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": 3, "backbone": "", "model": ""}'])
def test_a_damaged_pointer_is_told(run: Path, text: str) -> None:
    (run / "base.json").write_text(text)
    with pytest.raises(RunError, match=r"base\.json: cannot be read"):
        open_run(run)


def test_a_backbone_that_is_gone_is_told(run: Path) -> None:
    edit(run, path="/gone")
    with pytest.raises(RunError, match="/gone: the backbone of"):
        backbone_and_adapter(run)
