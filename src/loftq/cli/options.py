"""Flags shared by verbs, and key=value pairs and config files turned into library arguments."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

EVERYDAY, MORE = "Everyday", "Less often"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder with safetensors weights, or a hub id.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Anything else: iters=5 scale_fit=mse embeddings=true ..."
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(help="4, 3 or 2; 2.5 mixes formats as --allocation says. Default 4."),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How a fraction of bits is spent: first (blocks at 4 bits, the rest at 2; default) or "
        "by measured cost: error, relative, kl."
    ),
]
Rotation = Annotated[
    str | None,
    typer.Option(
        help="Rotate the inputs of a layer: none (default), all, or auto: where it lowers the "
        "error. Only loftq's own layers run it."
    ),
]
Format = Annotated[
    str | None, typer.Option(help="Format by name, over --bits: nf3-g64-dq, int4-g128-f16, ...")
]
Method = Annotated[
    str | None,
    typer.Option(
        help="loftq (default), qlora, or fast, best and max, which need `quantize --data`; "
        "`loftq lab methods` lists reproductions."
    ),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapters. Default 16.")]
Alpha = Annotated[
    float | None, typer.Option(help="LoRA's alpha; the start is exact for any. Default: the rank.")
]
Data = Annotated[
    str | None,
    typer.Option(help="Text to calibrate on, for methods that need it: .txt, .raw, .jsonl, .gz."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="Modules to quantize, by name or pattern; repeat or separate by commas."),
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Modules to leave at 16 bits, in the same way.")
]
Engine = Annotated[
    str | None,
    typer.Option("--for", help="Pick a format that transformers, vllm or llama.cpp can hold."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the GPU if any.")]
Scored = Annotated[
    str, typer.Argument(metavar="PATH", help="OUT of quantize, RUN of train, or a plain model.")
]
AdapterOf = Annotated[
    str | None, typer.Option(help="Adapter folder, or none. Default: RUN's, else the start.")
]
Seed = Annotated[int | None, typer.Option(help="Of everything random. Default 0.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the same keys; flags win over it.")
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to this hub repository."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
AllowUncovered = Annotated[
    bool,
    typer.Option("--allow-uncovered", help="Accept that over 20 % of the linear weights stay."),
]

SHARD_BYTES = "max_shard_bytes"
EXTRA_KEYS = ("device", SHARD_BYTES)
AFTER_KEYS = {"report": bool | None, "private": bool | None, "base": str | None}
"""Keys about a finished output, with their types: its page and its place on the hub."""
ALIASES = {"for": "engine"}
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Request:
    """What the user asked for, in the library's terms."""

    options: Mapping[str, Any]
    """Fields of QuantizeConfig, `device` and `max_shard_bytes`; only those that were given."""
    after: Mapping[str, Any] = field(default_factory=dict)
    """Those of AFTER_KEYS that were given."""

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that are not defaults."""
        return frozenset(self.options)


def collect(
    flags: Mapping[str, Any],
    settings: Iterable[str] | None,
    config: Path | None,
    known: Mapping[str, Any] | None = None,
) -> Request:
    """Merge the config file, the key=value pairs and the flags, the later over the earlier.

    Args:
        flags: library name -> value of the flag, None (or False, or no items) where not given. One
            that is no key of `known` is only named to whom gives it as a key.
        settings: "key=value" words.
        config: YAML file.
        known: every key with its type; None = those of a quantization.

    Raises:
        typer.BadParameter: a word that is not key=value, an unknown key, or a flag given twice.
        ValueError: a config file with an unknown key, or a value of the wrong type anywhere.
    """
    known = keys() if known is None else known
    options = {} if config is None else _from_file(config, known)
    pairs = _pairs(settings or (), known, flags)
    chosen = {key: value for key, value in flags.items() if _was_given(value)}
    twice = sorted(pairs.keys() & chosen.keys())
    if twice:
        raise typer.BadParameter(f"{twice[0]} is given as a flag and as {twice[0]}=...; give one.")
    options |= {key: _typed(key, value, known) for key, value in (pairs | chosen).items()}
    options = {key: value for key, value in options.items() if value is not None}
    after = {key: options.pop(key) for key in AFTER_KEYS if key in options}
    return Request(options, after)


def _was_given(value: object) -> bool:
    """Whether a flag was used: a 0 counts, unlike an absent value, switch or list."""
    return value is not None and value is not False and value != []


def keys() -> dict[str, Any]:
    """Every key with its type: the fields of QuantizeConfig, and those of the run."""
    from loftq.pipeline.config import QuantizeConfig

    hints = get_type_hints(QuantizeConfig)
    found = {field.name: hints[field.name] for field in fields(QuantizeConfig)}
    return {**found, "device": str | None, SHARD_BYTES: int, **AFTER_KEYS}


def parse_pairs(words: Iterable[str], known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """key=value words of a verb with few keys: each key has its own parser.

    Raises:
        typer.BadParameter: not key=value, unknown key, or a value its parser refuses.
    """
    found = {}
    for word in words:
        key, value = _split(word)
        if key not in known:
            raise typer.BadParameter(unknown_key(key, known))
        try:
            found[key] = known[key](value)
        except ValueError as error:
            raise typer.BadParameter(f"{key}={value}: {error}") from error
    return found


def split_names(items: Iterable[str]) -> tuple[str, ...]:
    """Names given one by one or separated by commas."""
    return tuple(name.strip() for item in items for name in item.split(",") if name.strip())


def positive(value: str) -> int:
    """Check a count of at least 1.

    Raises:
        ValueError: it is none.
    """
    if not value.isdigit() or int(value) < 1:
        raise ValueError("expected a whole number of at least 1")
    return int(value)


def dtype_name(value: str) -> str:
    """Check the value of dtype=.

    Raises:
        ValueError: not a dtype that models are loaded in.
    """
    from loftq.integrations.causal import DTYPES

    if value not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    return value


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say about a key that does not exist."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"unknown option {key!r}. {hint}Known: {', '.join(known)}."


def _pairs(words: Iterable[str], known: Mapping[str, Any], flags: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, value = _split(word)
        if key not in known and key in flags:
            raise typer.BadParameter(f"{key} is a flag: --{key} {value}.")
        if key not in known:
            raise typer.BadParameter(unknown_key(key, known))
        if key in found:
            raise typer.BadParameter(f"{key} is given twice.")
        found[key] = value
    return found


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise typer.BadParameter(
            f"unexpected {word!r}: further arguments are key=value pairs, such as iters=5."
        )
    key = key.strip().replace("-", "_")
    return ALIASES.get(key, key), value.strip()


def _from_file(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of `key: value`, found {type(values).__name__}.")
    _check_version(path, values.pop("version", None))
    found = {}
    for name, value in values.items():
        key = ALIASES.get(str(name), str(name).replace("-", "_"))
        if key not in known:
            raise ValueError(f"{path}: {unknown_key(str(name), known)}")
        try:
            found[key] = _typed(key, value, known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


def _check_version(path: Path, version: object) -> None:
    from loftq.pipeline.config import CONFIG_VERSION

    if version not in (None, CONFIG_VERSION):
        raise ValueError(f"{path}: version {version!r} is not {CONFIG_VERSION}: update loftq.")


def _typed(key: str, value: Any, known: Mapping[str, Any]) -> Any:
    """The value in the type of its key; words and YAML values alike. None is "the default"."""
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    hint = str(known[key])
    if key == SHARD_BYTES:
        return byte_count(key, value)
    if "Mapping" in hint:
        return _mapping(key, value)
    if "tuple[int" in hint:
        items = value.split(",") if isinstance(value, str) else value
        items = items if isinstance(items, list | tuple) else [items]
        return tuple(_number(key, item, int, "whole numbers") for item in items)
    if "tuple" in hint:
        return _names(key, value)
    if "bool" in hint:
        return _truth(key, value)
    if "float" in hint:
        return _number(key, value, float, "a number")
    if "int" in hint:
        return _number(key, value, int, "a whole number")
    if not isinstance(value, str):
        raise ValueError(f"{key}={value!r}: expected a word.")
    return value


def _number(key: str, value: Any, kind: Callable[[Any], Any], what: str) -> Any:
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}={value}: expected {what}.") from None


def _truth(key: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError(f"{key}={value}: expected true or false.")
    return words[str(value).lower()]


def _names(key: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{key}={value!r}: expected names or patterns.")
    return split_names(items)


def _mapping(key: str, value: Any) -> dict[str, str]:
    """A YAML mapping, or PATTERN:FORMAT,PATTERN:FORMAT on the command line."""
    if isinstance(value, str):
        parts = [part.rpartition(":") for part in value.split(",") if part.strip()]
        value = {pattern.strip(): name.strip() for pattern, _, name in parts}
    pairs = value.items() if isinstance(value, dict) else ()
    if not pairs or not all(isinstance(k, str) and k and isinstance(v, str) for k, v in pairs):
        raise ValueError(f"{key}={value!r}: expected PATTERN:FORMAT pairs, as *.down_proj:nf4-g64.")
    return dict(pairs)


def byte_count(key: str, value: Any) -> int:
    """Bytes in words, such as 5GB or 500MB.

    Raises:
        ValueError: not a positive size.
    """
    text = str(value).strip().lower()
    digits = text.rstrip("bgikm")
    unit = UNITS.get(text[len(digits) :].strip())
    try:
        amount = float(digits)
    except ValueError:
        amount = -1.0
    if unit is None or not 0 < amount * unit < 2**63:
        raise ValueError(f"{key}={value}: expected bytes, such as 5GB or 500MB.")
    return int(amount * unit)
