"""Which files of a folder hold the weights, and whether they may be read.

File names come from an index that anyone may have written: only plain names inside the folder are
followed, and links only where a model hub's own cache puts them.
"""

from __future__ import annotations

from pathlib import Path

from loftq.checkpoint.header import MAX_HEADER_BYTES, CheckpointError, damaged, parse_json_object

INDEX_SUFFIX = ".index.json"
DEFAULT_WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX_SUFFIX)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_weights(folder: Path) -> str:
    """Name of the file or index that holds the weights: the single file first, as transformers.

    Raises:
        CheckpointError: neither exists; says what the folder holds instead and what to do.
    """
    for name in DEFAULT_WEIGHTS:
        if (folder / name).is_file():
            return name
    raise CheckpointError(f"{folder}: {_why_none(sorted(p.name for p in folder.iterdir()))}")


def read_weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> file name, from an index; every file is there and may be read.

    Raises:
        CheckpointError: malformed index, names that leave the folder, missing files (all listed).
    """
    path = contained(folder, index)
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise damaged(path, f"an index of {path.stat().st_size} bytes")
    weight_map = parse_json_object(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "no weight_map from tensor names to files")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise damaged(path, "a weight_map entry is not a file name")
    files = sorted(set(weight_map.values()))
    for file in files:
        _check_plain_name(path, file)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} files are missing: {', '.join(missing)}. "
            "Copy or download the complete checkpoint."
        )
    return weight_map


def contained(folder: Path, name: str) -> Path:
    """`folder / name`, refused where it is missing or leads out of the folder."""
    _check_plain_name(folder, name)
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Copy or download the complete checkpoint.")
    target, home = path.resolve(), folder.resolve()
    if target.parent != home and not _is_hub_cache_blob(home, target):
        raise CheckpointError(
            f"{path}: a link to {target}, outside the folder. Copy the file here, or open the "
            "folder that holds it."
        )
    return path


def _is_hub_cache_blob(home: Path, target: Path) -> bool:
    # A hub cache is MODEL/snapshots/REVISION/file -> MODEL/blobs/HASH.
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"


def _check_plain_name(where: Path, name: str) -> None:
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise CheckpointError(
            f"{where}: names the file {name!r}, expected a plain file name inside the folder. "
            "Do not use this checkpoint unless you know who wrote it."
        )


def _why_none(names: list[str]) -> str:
    """What a folder without safetensors weights holds instead, and the way on."""
    if any(name.endswith(".partial") for name in names):
        return "an unfinished output. Run the command that wrote it again: it resumes."
    others = [n for n in names if n.endswith((".safetensors", ".safetensors" + INDEX_SUFFIX))]
    if others:
        return (
            f"neither {' nor '.join(DEFAULT_WEIGHTS)}, but {', '.join(others[:5])}. "
            "Name the one to read with weights=."
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"only pickle weights ({', '.join(pickles[:5])}), which can run code when loaded and "
            "are not read. Take the model's safetensors revision, or convert it once: "
            "AutoModel.from_pretrained(FOLDER, weights_only=True).save_pretrained(NEW_FOLDER)."
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            "only GGUF weights, which are already quantized. Start from the original safetensors "
            "model, or convert: AutoModel.from_pretrained(FOLDER, gguf_file=NAME)."
            "save_pretrained(NEW_FOLDER)."
        )
    return f"no weights, expected {' or '.join(DEFAULT_WEIGHTS)}. Check the path."
