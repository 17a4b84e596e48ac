"""Cards are read back by the hub's own parser and say where a model comes from."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import loftq
import zoo
from loftq.integrations.card import (
    CARD,
    adapter_card,
    backbone_repo,
    hub_id_of,
    origin_of,
    output_card,
    read_front_matter,
    write_adapter_card,
)
from loftq.integrations.run_folder import open_run
from trained_run import write_run

BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
base_model: somebody/else
datasets: [a/b]
extra_gated_prompt: give us your name
---
# The base
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    zoo.save(zoo.build("llama"), folder / "source")
    (folder / "source" / CARD).write_text(BASE_CARD)
    loftq.quantize(folder / "source", folder / "out", rank=4, bits=2)
    write_run(folder / "run", folder / "out")
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def run(out: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", out)


def test_the_card_of_an_output_has_the_front_matter_of_the_hub(out: Path) -> None:
    data = ModelCard.load(out / CARD).data.to_dict()
    assert data == {
        "library_name": "loftq",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["loftq", "2-bit", "lora"],
    }


def test_a_base_on_the_hub_is_named_and_its_licence_file_linked(made: Path) -> None:
    record = json.loads((made / "out" / "loftq.json").read_text())
    card = output_card(record, origin_of("org/base", made / "source"), name="small")
    data = ModelCard(card).data
    assert (data.base_model, data["base_model_relation"]) == ("org/base", "quantized")
    assert data.license_link == f"{constants.ENDPOINT}/org/base/blob/main/LICENSE"


def test_the_import_comes_first_and_the_results_stand_in_a_table(out: Path) -> None:
    text = ModelCard.load(out / CARD).text
    lines = [line for line in text.splitlines() if line]
    assert lines[:3] == ["# out", "```python", lines[2]]
    assert lines[2].startswith("import loftq")
    record = json.loads((out / "loftq.json").read_text())
    assert f"| relative weight error | {record['totals']['mean_plain_error']:.4f} rounded" in text
    assert f"{record['totals']['packed_bytes']:,} packed" in text
    assert "alone it is worse than plain rounding" in text


@pytest.mark.parametrize(
    ("name", "folder", "found"),
    [
        ("org/base", "/models/base", "org/base"),
        ("/models/base", "/models/base", None),
        ("./base", "./base", None),
        ("gpt2", "/models/base", None),
        ("/c/models--org--a-b.c/snapshots/12", "/c/models--org--a-b.c/snapshots/12", "org/a-b.c"),
    ],
)
def test_a_hub_id_is_told_from_a_folder(name: str, folder: str, found: str | None) -> None:
    assert hub_id_of(name, Path(folder)) == found


def test_a_folder_named_like_a_hub_id_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id_of("org/base", Path("org/base")) is None


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertModel", None),
    ],
)
def test_without_a_card_the_class_tells_the_task(
    architecture: str, task: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert origin_of("x", tmp_path).copied.get("pipeline_tag") == task


@pytest.mark.parametrize(
    "text", ["", "no front", "---\n- a\n---\n", "---\na: [\n---\n", "---\na: 1"]
)
def test_a_card_without_usable_front_matter_gives_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(text)
    assert read_front_matter(tmp_path / CARD) == {}


def test_the_adapter_card_of_a_run_has_its_results_and_no_base_unless_it_is_known(
    run: Path,
) -> None:
    card = ModelCard.load(write_adapter_card(open_run(run)))
    assert card.data.base_model is None
    assert (card.data.library_name, card.data.license) == ("peft", "other")
    assert (
        "| best validation loss, nats per token | 2.2000 at step 15; 4.0000 at step 0 |"
        in card.text
    )
    assert "| tokens with a loss | 9,120 |" in card.text
    assert f"adapter={json.dumps(str(run / 'adapter'))}" in card.text


def test_a_pushed_backbone_is_the_base_of_its_adapters_until_it_is_overwritten(
    run: Path, out: Path
) -> None:
    backbone = json.loads((out / "loftq.json").read_text())["backbone"]
    note = {"version": 1, "repo": "me/packed", "backbone": backbone}
    (out / "hub.json").write_text(json.dumps(note))
    data = ModelCard.load(write_adapter_card(open_run(run))).data
    assert (data.base_model, data["base_model_relation"]) == ("me/packed", "adapter")
    (out / "hub.json").write_text(json.dumps({**note, "backbone": "0" * 64}))
    assert backbone_repo(out) is None


def test_names_of_the_user_are_text(run: Path, made: Path) -> None:
    name = "a|b\n<b>`x`"
    found = open_run(run)
    card = adapter_card(found, origin_of("me/p", made / "source"), name=name, base="o`ut\nx")
    assert "# a\\|b \\<b\\>\\`x\\`\n" in card
    assert "`o'ut x`" in card
    assert ModelCard(card).data.base_model == "me/p"
