"""Help, version, exit codes, and how errors reach the user."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest

from loftq import __version__
from loftq.cli import main as module
from loftq.cli.main import main

VERBS = ("plan", "quantize", "eval", "inspect", "doctor", "lab")


def test_help_lists_every_verb(loftq: Callable) -> None:
    answer = loftq("--help")
    assert answer.code == 0
    assert all(re.search(rf"^  {verb} ", answer.out, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("words", [(verb,) for verb in VERBS] + [("eval", "ppl"), ("lab", "demo")])
def test_every_verb_has_help(loftq: Callable, words: tuple[str, ...]) -> None:
    answer = loftq(*words, "--help")
    assert answer.code == 0
    assert f"Usage: loftq {' '.join(words)}" in answer.out


def test_version(loftq: Callable) -> None:
    assert loftq("--version").out == f"loftq {__version__}\n"


def test_help_of_all_verbs_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys; from loftq.cli.main import main; main(['quantize', '--help']); "
        "print([m for m in ('torch', 'transformers', 'rich', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "words",
    [
        ("quantise",),
        ("quantize",),
        ("quantize", "model"),
        ("quantize", "model", "-o", "out", "--rank", "many"),
        ("quantize", "model", "-o", "out", "rank"),
        ("quantize", "model", "-o", "out", "rnak=4"),
        ("quantize", "model", "-o", "out", "rank=4", "--rank", "8"),
        ("quantize", "model", "-o", "out", "rank=4", "rank=8"),
        ("eval", "ppl", "model", "--data", "x.txt", "batch=0"),
        ("eval", "ppl", "model", "--data", "x.txt", "dtype=int8"),
        ("eval", "ppl", "model"),
    ],
)
def test_mistakes_in_the_command_exit_with_2(loftq: Callable, words: tuple[str, ...]) -> None:
    answer = loftq(*words)
    assert answer.code == 2
    assert answer.out == ""
    assert "Usage:" in answer.err


def test_an_unknown_key_suggests_the_nearest(loftq: Callable) -> None:
    answer = loftq("plan", "model", "scale-fits=mse")
    assert "unknown option 'scale_fits'. Did you mean scale_fit?" in " ".join(answer.err.split())


def raising(error: BaseException) -> Callable[..., None]:
    def verb(**_: object) -> None:
        raise error

    return verb


@pytest.mark.parametrize("error", [ValueError("a: b. Do c."), FileNotFoundError("a: b. Do c.")])
def test_an_error_of_the_user_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(module, "app", raising(error))
    assert main(["plan"]) == 1
    assert capsys.readouterr() == ("", "error: a: b. Do c.\n")


def test_traceback_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "app", raising(ValueError("wrong")))
    with pytest.raises(ValueError, match="wrong"):
        main(["plan", "model", "--traceback"])


def test_a_missing_package_points_to_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ModuleNotFoundError("No module named 'peft'", name="peft")
    monkeypatch.setattr(module, "app", raising(error))
    assert main(["plan"]) == 1
    assert "No module named 'peft'. `loftq doctor` lists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [AssertionError("ours"), ModuleNotFoundError("no loftq.x", name="loftq.x")]
)
def test_a_bug_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(module, "app", raising(error))
    with pytest.raises(type(error)):
        main(["plan"])


def test_a_warning_is_one_line_and_formats_are_put_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(**_: object) -> None:
        shown = warnings.formatwarning("take care", UserWarning, "file.py", 3)
        sys.stderr.write(shown)

    before = warnings.formatwarning
    monkeypatch.setattr(module, "app", verb)
    assert main(["plan"]) == 0
    assert capsys.readouterr().err == "warning: take care\n"
    assert warnings.formatwarning is before
