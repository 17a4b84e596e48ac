"""Tools that know nothing of loftq load its folders under `python -m loftq.run`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import loftq
from loftq.run import main
from packed_folder import tiny_llama, write_packed

SOURCE = str(Path(loftq.__file__).parents[1])
TOOL = """\
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
kind = type(model.model.layers[0].mlp.up_proj).__name__
print(kind, sys.argv[2:], __name__, "loftq" in globals())
"""
LAUNCHER = """\
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "tool.py", sys.argv[1], "from", "a", "launcher"]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder, and tools that do not import loftq."""
    folder = tmp_path_factory.mktemp("run")
    write_packed(tiny_llama(), folder / "packed")
    (folder / "tool.py").write_text(TOOL)
    (folder / "launcher.py").write_text(LAUNCHER)
    return folder


def python(place: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE, **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip


def test_a_tool_alone_stops_instead_of_loading_noise(place: Path) -> None:
    found = python(place, "tool.py", "packed")
    assert found.returncode != 0
    assert "no file named model.safetensors" in found.stderr


@pytest.mark.parametrize("tool", [["tool.py"], ["-m", "tool"]], ids=["script", "module"])
def test_a_tool_runs_in_this_process(place: Path, tool: list[str]) -> None:
    found = python(place, "-m", "loftq.run", *tool, "packed", "--flag", "-m")
    assert found.returncode == 0, found.stderr
    assert found.stdout == "QuantLinear ['--flag', '-m'] __main__ False\n"


def test_what_a_launcher_starts_knows_loftq_too(place: Path) -> None:
    (place / "sitecustomize.py").write_text("import sys\nsys.stderr.write('the next one\\n')\n")
    variables = {"PYTHONPATH": os.pathsep.join([SOURCE, str(place)])}
    found = python(place, "-m", "loftq.run", "launcher.py", "packed", **variables)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "QuantLinear ['from', 'a', 'launcher'] __main__ False\n"
    assert found.stderr.count("the next one") == 2  # hidden from neither process
    (place / "sitecustomize.py").unlink()


def test_an_installed_command_goes_by_its_name(place: Path) -> None:
    found = python(place, "-m", "loftq.run", "accelerate", "env", "--help")
    assert found.returncode == 0, found.stderr
    assert "usage: accelerate <command> [<args>] env" in " ".join(found.stdout.split())


def test_the_status_of_the_tool_comes_through(place: Path) -> None:
    (place / "exit.py").write_text("import sys\nsys.exit(7)\n")
    assert python(place, "-m", "loftq.run", "exit.py").returncode == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "usage:"), (["-m"], "usage:"), (["no-such-tool"], "no-such-tool: no such file, and no")],
)
def test_no_tool_is_a_mistake(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # which it changes
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "such as trl, accelerate or lm_eval" in capsys.readouterr().out
