"""The examples of the documentation run: blocks after `<!-- run -->`, on a tiny random Llama.

The blocks of a page run in order, in one folder and one namespace, as a reader would run them.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf
import typer

from loftq.cli.main import app, main

ROOT = Path(__file__).parent.parent
LINKED = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
MARKED = re.compile(r"^<!-- run -->\n+```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in LINKED if MARKED.search((ROOT / page).read_text(encoding="utf-8"))]
BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
WORDS = ("a", "river", "carries", "water", "and", "mud", "to", "the", "sea", ".")
CONTEXT = 512
ROWS = 50
TURNS = [
    {"role": "user", "content": "what carries water ?"},
    {"role": "assistant", "content": "a river carries water to the sea ."},
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the examples: `model`, chats to learn, and a text to score."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n" * ROWS)
    (tmp_path / "text.txt").write_text("A river carries water and mud to the sea.\n" * CONTEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where `train` keeps backbones
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about itself
def test_marked_examples_run(
    page: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("__main__")
    for line, language, code in _blocks(page):
        if language == "python":
            # Compiled at its place in the page, so that a traceback points there.
            exec(compile("\n" * line + code, page, "exec"), module.__dict__)
            continue
        for command in code.splitlines():
            _run(command, f"{page}:{line}", capsys)


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target} does not exist"
        if anchor:
            assert anchor in _anchors(path), f"{page}: {target} has no heading #{anchor}"


def commands() -> list[str]:
    """Every loftq command in a code block of a page, run or not, one of a kind."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in LINKED)
    lines = [line for block in BASH.findall(text) for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("loftq ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_has_the_verbs_and_flags_it_uses(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{line}: no verb {words[0]}"
        context, command = typer.Context(command, context), command.commands[words.pop(0)]
    command.make_context(command.name, words, context)  # raises for an unknown flag


def _blocks(page: str) -> list[tuple[int, str, str]]:
    """(line before the code, language, code) of each marked block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)), m[1], m[2]) for m in MARKED.finditer(text)]


def _run(command: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command, comments=True)
    if not words:
        return
    assert words[0] == "loftq", f"{where}: only loftq commands can be run, found {command!r}"
    status = main(words[1:])
    captured = capsys.readouterr()
    assert status == 0, f"{where}: {command}\n{captured.out}{captured.err}"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **special)
