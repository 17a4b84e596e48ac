"""What is uploaded, what stays, and what is refused; the hub is a dictionary here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard, errors

import loftq
import zoo
from loftq.integrations import publish
from loftq.integrations.publish import PublishError, check_repo, push
from trained_run import write_run

SHARD = "loftq-00001-of-00001.safetensors"


class Hub:
    """As much of HfApi as is used: repositories are dictionaries of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.error: Exception | None = None

    def whoami(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {"name": "me"}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repos.setdefault(repo, {})
        self.private.setdefault(repo, private)

    def repo_exists(self, repo: str) -> bool:
        return repo in self.repos

    def list_repo_files(self, repo: str) -> list[str]:
        return list(self.repos[repo])

    def hf_hub_download(self, repo: str, name: str) -> str:
        path = self.folder / name
        path.write_bytes(self.repos[repo][name])
        return str(path)

    def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> Any:
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    self.repos[repo][operation.path_in_repo] = file.read()
            else:
                del self.repos[repo][operation.path_in_repo]
        return SimpleNamespace(commit_url=f"hub:{repo}/commit/1")

    def json(self, repo: str, name: str) -> Any:
        return json.loads(self.repos[repo][name])

    def card(self, repo: str) -> ModelCard:
        return ModelCard(self.repos[repo]["README.md"].decode())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "downloads").mkdir()
    made = Hub(tmp_path / "downloads")
    monkeypatch.setattr(publish, "_api", lambda: made)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish")
    zoo.save(zoo.build("llama"), folder / "source")
    (folder / "source" / "tokenizer_config.json").write_text("{}")
    loftq.quantize(folder / "source", folder / "out", rank=4, bits=2)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def run(out: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", out)


def test_an_output_goes_up_in_one_commit_without_what_is_only_of_use_here(
    out: Path, hub: Hub
) -> None:
    for name in ("report.html", "notes.bin", ".hidden.json", "hub.json"):
        (out / name).write_text("{}")
    (out / "run").mkdir()
    (out / "run" / "samples.json").write_text("[]")
    pushed = push(out, "me/packed", private=True)
    assert set(hub.repos["me/packed"]) == {
        "README.md", "config.json", "generation_config.json", "loftq.json", SHARD,
        "loftq.safetensors.index.json", "tokenizer_config.json",
        "init_adapter/adapter_config.json", "init_adapter/adapter_model.safetensors",
        "init_adapter/loftq_lineage.json",
    }  # fmt: skip
    assert hub.private["me/packed"]
    assert pushed.url == "hub:me/packed/commit/1"
    assert pushed.files == 10
    assert pushed.bytes == sum(map(len, hub.repos["me/packed"].values()))
    assert hub.repos["me/packed"][SHARD] == (out / SHARD).read_bytes()


def test_no_folder_of_this_machine_is_uploaded(made: Path, out: Path, hub: Hub) -> None:
    push(out, "packed", base="org/original")
    for name, content in hub.repos["me/packed"].items():
        assert str(made).encode() not in content, name
    assert hub.json("me/packed", "init_adapter/adapter_config.json")[
        "base_model_name_or_path"
    ] == "me/packed"  # fmt: skip
    assert hub.json("me/packed", "loftq.json")["source"]["name"] == "org/original"
    assert hub.card("me/packed").data.base_model == "org/original"
    assert 'loftq.load("me/packed", trainable=True)' in hub.card("me/packed").text
    assert str(made) in (out / "loftq.json").read_text()  # untouched here


def test_a_second_push_removes_shards_that_are_gone(out: Path, hub: Hub) -> None:
    hub.repos["me/packed"] = {"loftq-00001-of-00002.safetensors": b"", "figure.png": b""}
    push(out, "me/packed")
    assert "loftq-00001-of-00002.safetensors" not in hub.repos["me/packed"]
    assert "figure.png" in hub.repos["me/packed"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "q4.gguf"])
def test_a_repository_with_other_weights_is_left_alone(out: Path, hub: Hub, name: str) -> None:
    hub.repos["me/packed"] = {name: b"theirs"}
    with pytest.raises(PublishError, match=f"holds {name}, weights that are not ours"):
        push(out, "me/packed")
    assert hub.repos["me/packed"] == {name: b"theirs"}


def test_an_adapter_whose_backbone_is_nowhere_is_refused(run: Path, hub: Hub) -> None:
    with pytest.raises(PublishError, match=r"nowhere on the hub\. Say where it belongs with base="):
        push(run, "me/adapter")
    assert hub.repos == {}


def test_an_adapter_names_the_repository_of_its_pushed_backbone(
    run: Path, out: Path, hub: Hub
) -> None:
    push(out, "me/packed")
    pushed = push(run, "me/adapter")
    assert pushed.base == "me/packed"
    assert set(hub.repos["me/adapter"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loftq_lineage.json",
    }  # fmt: skip
    config = hub.json("me/adapter", "adapter_config.json")
    assert config["base_model_name_or_path"] == "me/packed"
    card = hub.card("me/adapter")
    assert (card.data.base_model, card.data["base_model_relation"]) == ("me/packed", "adapter")
    assert 'loftq.load("me/packed", adapter=snapshot_download("me/adapter"))' in card.text


def test_a_new_base_is_pushed_first(run: Path, hub: Hub) -> None:
    push(run, "me/adapter", base="me/packed", private=True)
    assert SHARD in hub.repos["me/packed"]
    assert hub.private == {"me/packed": True, "me/adapter": True}
    assert hub.card("me/adapter").data.base_model == "me/packed"


def test_a_base_that_holds_another_backbone_is_refused(run: Path, out: Path, hub: Hub) -> None:
    push(out, "me/packed")
    config = hub.json("me/packed", "config.json")
    config["quantization_config"]["backbone"] = "f" * 64
    hub.repos["me/packed"]["config.json"] = json.dumps(config).encode()
    with pytest.raises(PublishError, match="me/packed: holds backbone ffffffffffff, the adapter"):
        push(run, "me/adapter")
    hub.repos["me/plain"] = {"config.json": b"{}"}
    with pytest.raises(PublishError, match="me/plain: holds no backbone of loftq"):
        push(run, "me/adapter", base="me/plain")
    assert "me/adapter" not in hub.repos


def test_adapter_and_backbone_do_not_share_a_repository(run: Path, hub: Hub) -> None:
    with pytest.raises(PublishError, match="cannot share a repository"):
        push(run, "me/both", base="me/both")


def test_another_folder_is_refused(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(PublishError, match=r"no loftq\.json and no base\.json"):
        push(tmp_path, "me/packed")


def test_a_name_without_an_owner_gets_the_users(hub: Hub) -> None:
    assert check_repo("packed") == "me/packed"
    assert check_repo("org/packed") == "org/packed"


@pytest.mark.parametrize("name", ["a/b/c", "a b", "", "x--y"])
def test_a_bad_name_is_refused_before_the_hub_is_asked(name: str, hub: Hub) -> None:
    hub.error = AssertionError("asked")
    with pytest.raises(PublishError, match="not a hub id"):
        check_repo(name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            errors.LocalTokenNotFoundError("no token"),
            "not logged in to the hub. Run `hf auth",
        ),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached .offline"),
        (TimeoutError("late"), "cannot be reached .late"),
    ],
)
def test_failures_of_the_hub_say_what_to_do(error: Exception, words: str, hub: Hub) -> None:
    hub.error = error
    with pytest.raises(PublishError, match=words):
        check_repo("me/packed")


def test_a_refusal_of_the_hub_is_told(hub: Hub) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    hub.error = errors.HfHubHTTPError("403 Forbidden: read token", response=response)
    with pytest.raises(PublishError, match=r"the hub refused \(403 Forbidden: read token\)"):
        check_repo("me/packed")
