"""What training needs of a tokenizer is there, chosen without resizing, or asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq.train.data.problems import DataError
from loftq.train.data.special import special_tokens
from loftq.train.data.templates import require_template, use_template
from tiny_tokenizers import CHATML, tiny


def test_a_tokenizer_that_has_all_is_left_alone() -> None:
    tokenizer = tiny()
    found = special_tokens(tokenizer)
    assert found.notes == ()
    assert (found.bos, found.eos, found.pad) == (None, 2, 0)
    assert found.every == {0, 1, 2, 3, 4}


def test_the_first_token_is_the_one_it_starts_texts_with() -> None:
    assert special_tokens(tiny(bos=True)).bos == 1


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"pad_token": None}, "<unk>"),
        ({"pad_token": None, "unk_token": "the"}, "<unk>"),
        ({"pad_token": None, "additional_special_tokens": ["<reserved_0>"]}, "<reserved_0>"),
    ],
)
def test_padding_is_an_existing_token_and_said(given: dict[str, str | None], chosen: str) -> None:
    tokenizer = tiny(**given)
    size = len(tokenizer)
    found = special_tokens(tokenizer)
    assert tokenizer.pad_token == chosen
    assert found.pad == tokenizer.convert_tokens_to_ids(chosen)
    assert chosen in found.notes[0]
    assert len(tokenizer) == size


def test_without_an_end_of_text_token_nothing_starts() -> None:
    with pytest.raises(DataError, match=r"no end-of-text token \(eos_token\)"):
        special_tokens(tiny(eos_token=None))


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow: cannot say where in a text its tokens stand"):
        special_tokens(Slow())


def test_a_missing_template_names_the_option_and_what_fits() -> None:
    with pytest.raises(DataError, match=r"Set chat_template=chatml\|turns\|alpaca, or a \.jinja"):
        require_template(tiny(template=None))


def test_a_template_of_tokens_that_are_missing_is_refused() -> None:
    tokenizer = tiny(template=None)
    tokenizer.get_vocab = lambda: {"<|im_start|>": 3}
    with pytest.raises(DataError, match=r"lacks its tokens .* Choose turns or alpaca"):
        use_template(tokenizer, "chatml")


def test_a_file_replaces_the_tokenizers_own_template(tmp_path: Path) -> None:
    tokenizer = tiny()
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML + " ")
    assert use_template(tokenizer, str(path)) == (
        f"chat template: {path} instead of the tokenizer's own"
    )
    assert tokenizer.chat_template == CHATML + " "


def test_no_choice_leaves_the_template() -> None:
    tokenizer = tiny()
    assert use_template(tokenizer, None) is None
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jinja", None, r"neither built in \(chatml, turns, alpaca\) nor a file"),
        ("empty.jinja", " ", "the file is empty"),
        ("bad.jinja", "{% for %}", r"bad\.jinja: not a template"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        use_template(tiny(), str(tmp_path / name))
