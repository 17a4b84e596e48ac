"""Outputs and trained adapters to the model hub, each in one commit.

What goes up is chosen by name: weights, configuration, tokenizer, records and the card. Samples,
metrics, data paths, checkpoints and the report stay here. Folder names of this machine are replaced
by hub ids in what is uploaded; the files on disk stay as they are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.checkpoint.durable import publish as put_in_place
from loftq.checkpoint.durable import write_partial
from loftq.integrations.card import (
    CARD,
    HUB_FILE,
    Origin,
    adapter_card,
    backbone_repo,
    copied_from,
    hub_id_of,
    output_card,
    read_front_matter,
)
from loftq.integrations.peft import read_lineage
from loftq.integrations.run_folder import RunFolder, open_run
from loftq.integrations.source import WANTED_SUFFIXES, http_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

START = "init_adapter"
ADAPTER_CONFIG = "adapter_config.json"
KEPT_HERE = {"timings.json", HUB_FILE, "SOURCE.json"}
FOREIGN = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of weights: a repository that holds others than ours is left alone."""


class PublishError(ValueError):
    """The folder cannot be pushed; says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded."""

    repo: str
    """Hub id."""
    url: str
    """Of the commit."""
    files: int
    bytes: int
    base: str | None
    """base_model of its card: the original of an output, the backbone of an adapter."""


def check_repo(repo: str) -> str:
    """The full hub id of `repo`; refuses a bad name or an absent login before any work.

    Raises:
        PublishError: not a hub id, not logged in, or the hub cannot be reached.
    """
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    try:
        utils.validate_repo_id(repo)  # type: ignore[attr-defined]
    except HFValidationError as error:
        raise PublishError(
            f"{repo!r}: not a hub id ({error}). Give one such as me/model."
        ) from error
    with _explained(repo):
        user = _api().whoami()["name"]
    return repo if "/" in repo else f"{user}/{repo}"


def push(
    folder: str | Path, repo: str, *, private: bool = False, base: str | None = None
) -> Pushed:
    """Upload an output of `loftq quantize`, or the trained adapter of a `loftq train` run.

    Args:
        folder: OUT or RUN.
        repo: hub id; made if it is not there.
        private: whether a new repository is private.
        base: hub id for `base_model`. Of an output: its full-precision original, where that was a
            local folder. Of a run: the repository of its backbone, which is pushed there first if
            it does not exist yet; None = where the backbone was pushed or downloaded from.

    Raises:
        PublishError: not a folder of ours, an adapter whose backbone is nowhere on the hub or
            another than `base` holds, a repository with other weights in it, no login, no network.
    """
    path = Path(folder)
    repo = check_repo(repo)
    if (path / "base.json").is_file():
        return _push_run(open_run(path), repo, private=private, base=base)
    if not (path / "loftq.json").is_file():
        raise PublishError(
            f"{path}: no loftq.json and no base.json, so neither an output of `loftq quantize` nor "
            "a run of `loftq train`. Give one of these."
        )
    return _push_output(path, repo, private=private, base=base)


def _push_output(folder: Path, repo: str, *, private: bool, base: str | None) -> Pushed:
    record = _object(folder / "loftq.json")
    name = str(record["source"]["name"])
    front = read_front_matter(folder / CARD).get("base_model")
    known = hub_id_of(name, Path(name))
    original = base or known or (front if isinstance(front, str) else None)
    origin = Origin(hub_id=original, copied=copied_from(folder))
    shown = original or Path(name).name
    record = {**record, "source": {**record["source"], "name": shown}}
    start = _object(folder / START / ADAPTER_CONFIG)
    files: dict[str, Path | bytes] = dict(_uploads(folder))
    files |= {f"{START}/{name}": path for name, path in _uploads(folder / START).items()}
    files |= {
        CARD: output_card(record, origin, name=repo.rpartition("/")[2], load_name=repo).encode(),
        "loftq.json": _json(record),
        f"{START}/{ADAPTER_CONFIG}": _json({**start, "base_model_name_or_path": repo}),
    }
    pushed = _commit(files, repo, private=private, base=original)
    note = {"version": 1, "repo": repo, "backbone": record["backbone"]}
    write_partial(folder / HUB_FILE, _json(note))
    put_in_place(folder / HUB_FILE)
    return pushed


def _push_run(run: RunFolder, repo: str, *, private: bool, base: str | None) -> Pushed:
    backbone = run.base().path
    home = base or backbone_repo(backbone)
    if home is None:
        raise PublishError(
            f"{run.path}: its adapter works on its own backbone alone, {backbone}, and that is "
            "nowhere on the hub. Say where it belongs with base=ME/BACKBONE: it is pushed there "
            "first."
        )
    if home == repo:
        raise PublishError(
            f"{repo}: the adapter and its backbone cannot share a repository. Give another name."
        )
    _settle_backbone(run, backbone, home, private=private)
    origin = Origin(hub_id=home, copied=copied_from(backbone))
    name = repo.rpartition("/")[2]
    config = _object(run.adapter / ADAPTER_CONFIG)
    files: dict[str, Path | bytes] = dict(_uploads(run.adapter))
    files |= {
        CARD: adapter_card(run, origin, name=name, base=home, load_name=repo).encode(),
        ADAPTER_CONFIG: _json({**config, "base_model_name_or_path": home}),
    }
    return _commit(files, repo, private=private, base=home)


def _settle_backbone(run: RunFolder, backbone: Path, home: str, *, private: bool) -> None:
    """Push the backbone if `home` does not exist; refuse a home that holds another one."""
    lineage = read_lineage(run.adapter)
    with _explained(home):
        api = _api()
        if not api.repo_exists(home):
            _push_output(backbone, home, private=private, base=None)
            return
        config = _object(Path(api.hf_hub_download(home, "config.json")))
    found = (config.get("quantization_config") or {}).get("backbone")
    if found != lineage:
        holds = f"backbone {found[:12]}" if isinstance(found, str) else "no backbone of loftq"
        raise PublishError(
            f"{home}: holds {holds}, the adapter in {run.adapter} belongs to {str(lineage)[:12]}. "
            "Name the repository of its own backbone, or a new one for it to be pushed to."
        )


def _commit(
    files: Mapping[str, Path | bytes], repo: str, *, private: bool, base: str | None
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _explained(repo):
        api = _api()
        api.create_repo(repo, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo))
        _refuse_foreign(there - files.keys(), repo)
        stale = [name for name in there - files.keys() if name.startswith("loftq-")]
        operations: list[Any] = [CommitOperationAdd(name, files[name]) for name in sorted(files)]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        done = api.create_commit(repo, operations, commit_message="Upload with loftq")
    return Pushed(
        repo=repo,
        url=str(done.commit_url),
        files=len(files),
        bytes=sum(len(x) if isinstance(x, bytes) else x.stat().st_size for x in files.values()),
        base=base,
    )


def _refuse_foreign(others: set[str], repo: str) -> None:
    weights = sorted(
        name for name in others if name.endswith(FOREIGN) and not name.startswith("loftq-")
    )
    if weights:
        raise PublishError(
            f"{repo}: holds {weights[0]}, weights that are not ours: a reader would load one or "
            "the other. Push to a new repository, or remove them there first."
        )


def _uploads(folder: Path) -> dict[str, Path]:
    """The files of a folder that go up, by name; nothing below it and nothing hidden."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in WANTED_SUFFIXES
        and path.name not in KEPT_HERE
        and not path.name.startswith(".")
    }


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the hub client's errors into one of ours."""
    from huggingface_hub import errors

    try:
        yield
    except PublishError:
        raise
    except errors.LocalTokenNotFoundError as error:
        raise PublishError(
            f"{repo}: not logged in to the hub. Run `hf auth login`, or set HF_TOKEN."
        ) from error
    except errors.HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise PublishError(
            f"{repo}: the hub refused ({reason}). Check the name, and that your token may write "
            "there (`hf auth whoami`)."
        ) from error
    except (http_error(), ConnectionError, TimeoutError) as error:  # HF_HUB_OFFLINE is one
        raise PublishError(
            f"{repo}: the hub cannot be reached ({error}). Nothing on this machine is lost: push "
            "again when it can."
        ) from error


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="loftq")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PublishError(f"{path}: cannot be read ({error}). Restore the folder.") from error
    if not isinstance(value, dict):
        raise PublishError(f"{path}: not a JSON object. Restore the folder.")
    return value


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
