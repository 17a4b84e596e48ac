"""docs/cli.md names every verb, flag and key, with its default."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer

from loftq.cli.chat import KEYS
from loftq.cli.main import app
from loftq.cli.options import SHARD_BYTES, keys
from loftq.integrations.generate import Sampling
from loftq.pipeline.config import QuantizeConfig
from loftq.train.config import TrainConfig

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE))
ALL = typer.main.get_command(app)
VERBS = {
    "plan": ("plan",),
    "quantize": ("quantize",),
    "inspect": ("inspect",),
    "train": ("train",),
    "eval ppl": ("eval", "ppl"),
    "eval TASK": ("eval", "rte"),
    "eval harness": ("eval", "harness"),
    "chat": ("chat",),
    "eval gap": ("eval", "gap"),
    "export": ("export",),
    "doctor": ("doctor",),
    "lab": ("lab", "demo"),
}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("title", VERBS)
def test_every_flag_of_a_verb_is_in_its_section(title: str) -> None:
    command = ALL
    for word in VERBS[title]:
        command = command.commands[word]  # type: ignore[attr-defined]
    text = section(title) + (section("quantize") if title == "plan" else "")
    flags = [name for parameter in command.params for name in getattr(parameter, "opts", [])]
    missing = [name for name in flags if name.startswith("-") and name not in text]
    assert missing == []


def test_every_key_is_listed() -> None:
    text = section("quantize")
    assert [key for key in keys() if f"`{key}`" not in text] == []


def test_every_key_of_chat_is_listed_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)=` \| (.*?) \|", section("chat"), re.MULTILINE))
    assert set(rows) == set(KEYS)
    for field in fields(Sampling):
        if field.name in rows:  # seed is a flag
            assert float(rows[field.name]) == field.default


def test_the_defaults_of_keys_are_those_of_the_configuration() -> None:
    words = {None: ("the method's", "the format's", "none"), False: ("`false`",), 16: ("`16`",),
             (): ("none", "the 2-, 3- and 4-bit formats")}  # fmt: skip
    for field in fields(QuantizeConfig):
        if field.name not in ROWS:
            continue  # a flag
        default = field.default if field.default is not MISSING else None
        named = words.get(default, (str(default),))
        assert ROWS[field.name].startswith(named), field.name
    assert ROWS[SHARD_BYTES] == "`5GB`"


@pytest.mark.parametrize(
    ("flag", "default"), [("bits", 4), ("rank", 16), ("seed", 0), ("method", "loftq")]
)
def test_the_defaults_of_flags_are_those_of_the_configuration(flag: str, default: object) -> None:
    assert getattr(QuantizeConfig(), flag) == default
    row = re.search(rf"^\| `--{flag}` \| `?(\w+)`? \|", PAGE, re.MULTILINE)
    assert row is not None
    assert row[1] == str(default)


def test_every_key_of_train_is_listed_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section("train"), re.MULTILINE))
    by_flag = {"seed", "report_to"}
    assert rows.keys() == {f.name for f in fields(TrainConfig)} - by_flag | {"cache"}
    for field in fields(TrainConfig):
        if field.name in by_flag or field.default is None:
            continue  # a default that depends is put in words
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert rows[field.name] == f"`{shown}`", field.name
