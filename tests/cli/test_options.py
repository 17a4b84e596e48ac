"""key=value pairs, config files and flags become library arguments."""

from pathlib import Path
from typing import Any

import pytest
import typer

from loftq.cli.options import collect, keys
from loftq.pipeline.config import QuantizeConfig


def options(*words: str, config: Path | None = None, **flags: Any) -> dict[str, Any]:
    return dict(collect(flags, words, config).options)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("iters=0", 0),
        ("bits=2.5", 2.5),
        ("alpha=32", 32.0),
        ("scale_fit=mse", "mse"),
        ("scale-fit=mse", "mse"),
        ("embeddings=true", True),
        ("rslora=no", False),
        ("skip=k_proj,*.v_proj", ("k_proj", "*.v_proj")),
        (
            "formats=*.down_proj:nf4-g64,layers.0:int8",
            {"*.down_proj": "nf4-g64", "layers.0": "int8"},
        ),
        ("max_shard_bytes=500MB", 500_000_000),
        ("max_shard_bytes=2GiB", 2 << 30),
        ("max_shard_bytes=123", 123),
        ("for=vllm", "vllm"),
        ("device=cuda:1", "cuda:1"),
    ],
)
def test_words_take_the_type_of_their_key(word: str, value: object) -> None:
    name = {"scale-fit": "scale_fit", "for": "engine"}.get(word.split("=")[0], word.split("=")[0])
    assert options(word) == {name: value}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("iters=five", "iters=five: expected a whole number"),
        ("rank=4.0", r"rank=4\.0: expected a whole number"),
        ("alpha=big", "alpha=big: expected a number"),
        ("embeddings=maybe", "embeddings=maybe: expected true or false"),
        ("formats=nf4", "expected PATTERN:FORMAT pairs"),
        ("max_shard_bytes=5TBx", "expected bytes, such as 5GB"),
        ("max_shard_bytes=-1", "expected bytes"),
        ("max_shard_bytes=GB", "expected bytes"),
    ],
)
def test_values_of_another_type_are_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(word)


def test_zero_is_a_value_and_an_absent_flag_is_not() -> None:
    given = options(alpha=0.0, seed=0, rank=None, skip=[], targets=None, allow_uncovered=False)
    assert given == {"alpha": 0.0, "seed": 0}


def test_none_means_the_default() -> None:
    assert options("iters=none", "alpha=null") == {}


def test_lists_may_be_repeated_or_separated_by_commas() -> None:
    assert options(skip=["a,b", "c"]) == {"skip": ("a", "b", "c")}


def test_flags_win_over_pairs_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "version: 1\nbits: 3\nrank: 8\niters: 2\nskip: [k_proj]\nfor: vllm\nscale-fit: null\n"
        "max_shard_bytes: 5GB\nformats: {'*.up_proj': nf2}\n"
    )
    assert options("iters=4", config=path, rank=32) == {
        "bits": 3.0,
        "rank": 32,
        "iters": 4,
        "skip": ("k_proj",),
        "engine": "vllm",
        "max_shard_bytes": 5_000_000_000,
        "formats": {"*.up_proj": "nf2"},
    }


def test_the_resolved_config_of_an_output_is_a_config_file(tmp_path: Path) -> None:
    import json

    config = QuantizeConfig(bits=2, rank=8, skip=("k_proj",), formats={"*.up_proj": "nf4"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert QuantizeConfig.from_dict(options(config=path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4", r"c\.yaml: unknown option 'rnak'\. Did you mean rank\?"),
        ("rank: many", r"c\.yaml: rank=many: expected a whole number"),
        ("rank: true", r"c\.yaml: rank=True: expected a whole number"),
        ("skip: 3", r"c\.yaml: skip=3: expected names or patterns"),
        ("formats: {a: 4}", r"c\.yaml: formats=.*: expected PATTERN:FORMAT"),
        ("method: 3", r"c\.yaml: method=3: expected a word"),
        ("version: 2", r"c\.yaml: version 2 is not 1: update loftq"),
        ("- rank", r"c\.yaml: expected lines of `key: value`, found list"),
        ("a: [", r"c\.yaml: not YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        options(config=tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["iters"], {}, "unexpected 'iters': further arguments are key=value pairs"),
        (["itres=4"], {}, "Did you mean iters?"),
        (["rank=4"], {"rank": 8}, "rank is given as a flag and as rank="),
        (["iters=4", "iters=5"], {}, "iters is given twice"),
    ],
)
def test_mistakes_in_the_command_are_usage_errors(
    words: list[str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        options(*words, **flags)
    assert message in caught.value.message


def test_every_key_of_the_configuration_can_be_given() -> None:
    assert set(QuantizeConfig().to_dict()) - {"version"} <= set(keys())
