"""From what the user typed to a local folder that can be quantized, or one clear refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq.checkpoint.index import find_weights

MAX_CONFIG_BYTES = 10 * 2**20
MAX_CARD_BYTES = 2**16
WANTED_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
# Copies of the same weights for another reader, or in another dtype.
_DUPLICATES = re.compile(r"consolidated.*|model\.(?!safetensors)[^.]+\.safetensors(\.index\.json)?")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4"}
_DEQUANTIZING = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


class SourceError(ValueError):
    """The model cannot be read or must not be quantized; says why and what to do instead."""


def resolve_source(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or a snapshot of a hub repository.

    Only safetensors, JSON and tokenizer files of the top level are downloaded, with the model card
    and a start adapter of ours. Without a network (or under HF_HUB_OFFLINE) the cache is used.

    Args:
        name_or_path: local folder or hub id ("org/name").
        revision: branch, tag or commit of a hub repository.

    Raises:
        SourceError: no such folder or repository, gated, not cached while offline, no safetensors.
    """
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise SourceError(_gguf(path.parent, path.name))
    if path.is_file():
        raise SourceError(
            f"{path}: a file. Give the folder that holds config.json and the weights."
        )
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise SourceError(
            f"{name}: no such folder. Give a folder with config.json and safetensors weights, or a "
            "hub id such as org/name."
        )
    return _download(name, revision)


def local_source(name_or_path: str | Path) -> Path | None:
    """The model's folder if it is on this machine, as a folder or in the hub cache; no network."""
    import huggingface_hub
    from huggingface_hub import errors

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(str(name_or_path)):
        return None
    try:
        return Path(huggingface_hub.snapshot_download(str(name_or_path), local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def refuse_unusable(folder: Path) -> None:
    """Raise unless `folder` holds a full-precision model whose code is in transformers.

    Reads config.json, the model card and file names, no weights.

    Raises:
        SourceError: no folder; config.json missing, malformed or huge; an adapter; already
            quantized; GGUF only; code of its own.
        CheckpointError: no safetensors weights, pickle only.
    """
    config = read_config(folder)
    method = quantization_method(config)
    if method is not None:
        raise SourceError(_already_quantized(folder, method, config))
    find_weights(folder)
    _refuse_remote_code(folder, config)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`, checked to be a JSON object of sane size that names a model type."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder. Check the path.")
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(_why_no_config(folder))
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise SourceError(
            f"{path}: {size} bytes, expected at most {MAX_CONFIG_BYTES}. This is not the "
            "configuration of a model; download it again."
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(
            f"{path}: no model_type, expected the configuration of a transformers model. "
            'Add "model_type" if you know it, or take the file from the original model.'
        )
    return config


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Name of the method a model of this configuration is quantized with, or None."""
    for holder in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, dict) and found:
                guess = "bitsandbytes" if "load_in_4bit" in found else "an unnamed method"
                return str(found.get("quant_method", guess))
    return None


def remote_code_problem(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Why the model of this configuration needs code that is not in transformers, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    remedy = (
        "loftq never runs code that comes with a model. Use a model that transformers knows by "
        "itself, a newer transformers if it does, or load the model yourself and call "
        "loftq.quantize_model."
    )
    if config["model_type"] not in CONFIG_MAPPING:
        own = "and brings its own code" if "auto_map" in config else "of no known model"
        return (
            f"{folder}: model_type {config['model_type']!r} is not in transformers {own}. {remedy}"
        )
    unknown = [name for name in architectures(config) if not _in_transformers(name)]
    if unknown and "auto_map" in config:
        return f"{folder}: {unknown[0]} is code that comes with the model. {remedy}"
    return None


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names in config.json, as far as they are names."""
    names = config.get("architectures")
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def _refuse_remote_code(folder: Path, config: Mapping[str, Any]) -> None:
    problem = remote_code_problem(folder, config)
    if problem:
        raise SourceError(problem)


def _in_transformers(name: str) -> bool:
    import transformers

    return name.isidentifier() and hasattr(transformers, name)


def _why_no_config(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "adapter_config.json" in names:
        return (
            f"{folder}: a PEFT adapter, not a model. Give the model it was trained on"
            f"{_named(_adapter_base(folder))}, or merge the adapter into it first."
        )
    if ggufs:
        return _gguf(folder, ggufs[0])
    return (
        f"{folder}: no config.json. Give the folder that holds config.json and the weights; if "
        "only the weights were copied, copy the rest of the model too."
    )


def _gguf(folder: Path, name: str) -> str:
    return (
        f"{folder / name}: GGUF, usually quantized already. Start from the original model, or "
        "convert it once and quantize the result:\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{name}")\n'
        '  model.save_pretrained("NEW_FOLDER")  # and the tokenizer in the same way'
    )


def _already_quantized(folder: Path, method: str, config: Mapping[str, Any]) -> str:
    if method == "loftq":
        return (
            f"{folder}: already quantized by loftq. Load it with loftq.load to use or train it; "
            "for other settings quantize its source again."
        )
    base = card_base(folder) or config.get("_name_or_path")
    text = (
        f"{folder}: already quantized with {_METHODS.get(method, method)}; a second quantization "
        f"would add its error to the first. Start from the original model{_named(base)}"
    )
    if method in _DEQUANTIZING:
        text += (
            ", or dequantize this one once: AutoModelForCausalLM.from_pretrained(FOLDER, "
            f"quantization_config={_DEQUANTIZING[method]}(dequantize=True))"
            ".save_pretrained(NEW_FOLDER)"
        )
    return text + "."


def _named(base: object) -> str:
    return f" ({base})" if isinstance(base, str) and base else ""


def card_base(folder: Path) -> str | None:
    """`base_model` in the front matter of the model card, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_CARD_BYTES)
    if not text.startswith("---"):
        return None
    front = text[3:].split("\n---", 1)[0]
    found = re.search(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?([\w./-]+)", front, re.MULTILINE)
    return found[1] if found else None


def _adapter_base(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size < MAX_CONFIG_BYTES else {}
    except (ValueError, RecursionError):
        return None
    return config.get("base_model_name_or_path") if isinstance(config, dict) else None


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        files = _repository_files(name, revision)
        if files is not None:
            _check_files(name, files)
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=None if files is None else _wanted(files),
                local_files_only=files is None,
            )
        )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{name}: a gated repository. Accept its terms on its page with your account, then log "
            "in here (`hf auth login`) and run this again."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{name}: no revision {revision!r}. Check its name.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise SourceError(
            f"{name}: neither a folder here nor a repository on the hub that you can see. Check "
            "the spelling; for a private repository log in first (`hf auth login`)."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"{name}: not a folder here, not in the hub cache, and the hub cannot be reached (no "
            "network, or HF_HUB_OFFLINE is set). Connect once to download it, or give a "
            "local folder."
        ) from error
    except (http_error(), OSError) as error:
        raise SourceError(
            f"{name}: the download failed ({_first_line(error)}). Run this again: it continues "
            "where it stopped."
        ) from error


def _repository_files(name: str, revision: str | None) -> list[str] | None:
    """Names of the files of a repository, or None where the hub cannot be reached."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return huggingface_hub.HfApi().list_repo_files(name, revision=revision)
    except errors.OfflineModeIsEnabled:
        return None
    except http_error() as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
            raise
        return None


def http_error() -> type[Exception]:
    """Base of all errors of the hub client's HTTP library, which differs between its versions."""
    from huggingface_hub import errors

    return getattr(errors, "HTTPError", OSError)


def _wanted(files: Sequence[str]) -> list[str]:
    top = [f for f in files if "/" not in f and f.endswith(WANTED_SUFFIXES)]
    chosen = [f for f in top if not _DUPLICATES.fullmatch(f)]
    chosen += [f for f in files if f == "README.md" or f.startswith("init_adapter/")]
    return [re.sub(r"([\[*?])", r"[\1]", f) for f in chosen]  # the client takes them as patterns


def _check_files(name: str, files: Sequence[str]) -> None:
    top = [file for file in files if "/" not in file]
    if any(file.endswith(".safetensors") for file in top):
        return
    ggufs = [file for file in top if file.endswith(".gguf")]
    if ggufs:
        raise SourceError(_gguf(Path(name), ggufs[0]))
    pickles = [file for file in top if file.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise SourceError(
            f"{name}: only pickle weights ({pickles[0]}), which can run code when loaded and are "
            "not read. Look for a revision or a copy with safetensors, or convert a model that you "
            "trust once: AutoModel.from_pretrained(NAME, weights_only=True)"
            ".save_pretrained(NEW_FOLDER), with the model's own class in place of AutoModel."
        )
    raise SourceError(
        f"{name}: no weights at the top level of the repository, expected model.safetensors. Check "
        "that this is a transformers model."
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
