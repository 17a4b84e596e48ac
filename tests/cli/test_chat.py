"""`loftq chat`: one answer for scripts, a conversation for people."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spoken import word_tokenizer
from trained_run import write_run

FEW = "max_new_tokens=5"


@pytest.fixture
def talking(out: Path) -> Path:
    """An output whose tokenizer has a chat template."""
    word_tokenizer().save_pretrained(out)
    return out


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Somebody at a terminal who types these lines, an exception standing for its key, then ^D."""

    def type_(*lines: str | type[BaseException]) -> None:
        typed: Iterator[str | type[BaseException]] = iter(lines)

        def read(_: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", read)

    return type_


def test_a_prompt_gives_the_answer_and_nothing_else(loftq: Callable, talking: Path) -> None:
    plain = loftq("chat", talking, "--prompt", "one two", FEW)
    assert plain.code == 0
    found = loftq("chat", talking, "--prompt", "one two", FEW, "--json").json
    assert plain.out == found["answer"] + "\n"
    assert found["tokens"] <= 5
    assert found["chat_template"]
    assert found["adapter"] == str(talking / "init_adapter")
    assert found["weights"] == "dense"


def test_a_pipe_is_a_prompt(
    loftq: Callable, talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = loftq("chat", talking, "--prompt", "one two", FEW)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two"))
    assert loftq("chat", talking, FEW).out == named.out


def test_a_cut_answer_is_remarked_on_stderr(loftq: Callable, talking: Path) -> None:
    found = loftq("chat", talking, "--prompt", "one", "max_new_tokens=1")
    assert "warning: cut at max_new_tokens=1" in found.err


def test_a_run_talks_with_its_own_adapter(loftq: Callable, talking: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", talking)
    found = loftq("chat", run, "--prompt", "one", FEW, "--json").json
    assert found["adapter"] == str(run / "adapter")
    assert found["model"] == str(talking)


def test_a_backbone_is_not_heard_without_its_adapter(loftq: Callable, talking: Path) -> None:
    found = loftq("chat", talking, "--prompt", "one", "adapter=none")
    assert found.code == 1
    assert "worse than plain rounding" in found.err


def test_a_conversation(loftq: Callable, talking: Path, person: Callable) -> None:
    person("one two", "", "three", "/reset", "one two", "/nonsense", KeyboardInterrupt, "/quit")
    found = loftq("chat", talking, FEW, "--device", "cpu")
    assert found.code == 0
    once = loftq("chat", talking, "--prompt", "one two", FEW, "--json").json
    assert found.out.count(once["answer"]) >= 2  # before and after the reset
    assert found.out.count(" a second") == 3
    for words in (
        str(talking), "init_adapter", "the likeliest token", "/reset forgets", "begins anew",
        "no such command", "Ctrl-D leaves",
    ):  # fmt: skip
        assert words in found.out


def test_ctrl_c_stops_the_answer_and_not_the_program(
    loftq: Callable, talking: Path, person: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq.cli import chat

    write = chat._write

    def interrupt(piece: str) -> None:
        monkeypatch.setattr(chat, "_write", write)  # from now on it is heard
        raise KeyboardInterrupt

    person("one", "two")
    monkeypatch.setattr(chat, "_write", interrupt)
    found = loftq("chat", talking, FEW)
    assert found.code == 0
    assert found.out.count("stopped by you") == 1
    assert found.out.count(" a second") == 1  # the second answer


def test_too_long_a_question_ends_nothing(loftq: Callable, talking: Path, person: Callable) -> None:
    person("one " * 5000, "two")
    found = loftq("chat", talking, FEW)
    assert found.code == 0
    assert "error: the prompt has" in found.out
    assert found.out.count(" token") >= 1
    once = loftq("chat", talking, "--prompt", "one " * 5000)
    assert once.code == 1
    assert "Shorten it" in once.err


def test_a_base_model_continues_and_says_so(loftq: Callable, out: Path, person: Callable) -> None:
    person("one two")
    found = loftq("chat", out, FEW)
    assert "continued as it is" in found.out
    refused = loftq("chat", out, "--prompt", "one", "system=two")
    assert refused.code == 1
    assert "no chat template" in refused.err


def test_a_terminal_gets_no_escape_sequence_from_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loftq.cli.chat import _write

    _write("\x1b[2Jone\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _write("\x1b[2Jtwo\n")
    assert capsys.readouterr().out == "\x1b[2Jone\n[2Jtwo\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x", "temprature=1"], "Did you mean temperature"),
        (["--prompt", "x", "max_new_tokens=many"], "expected a whole number"),
        (["--prompt", "x", "dtype=int4"], "expected one of auto"),
    ],
)
def test_a_mistake_in_the_command_is_2(
    loftq: Callable, tmp_path: Path, words: list[str], message: str
) -> None:
    found = loftq("chat", tmp_path, *words)
    assert found.code == 2
    assert message in " ".join(found.err.split())


def test_json_needs_one_prompt(loftq: Callable, tmp_path: Path, person: Callable) -> None:
    person()
    found = loftq("chat", tmp_path, "--json")
    assert found.code == 2
    assert "--json answers one prompt" in " ".join(found.err.split())


def test_an_unfinished_run_says_how_to_go_on(loftq: Callable, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(
        json.dumps({"path": "out", "backbone": "0" * 64, "model": "org/model"})
    )
    found = loftq("chat", tmp_path, "--prompt", "one")
    assert found.code == 1
    assert "goes on from the last checkpoint" in found.err
