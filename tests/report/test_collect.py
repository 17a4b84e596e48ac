"""What a page is made of, and what it says where something is missing."""

import json
import shutil
from pathlib import Path

import pytest

from loftq.report.collect import collect
from trained_run import DATA, MEMORY, SAMPLES


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_output_gives_its_backbone_alone(packed: Path) -> None:
    facts = collect(packed)
    assert facts.training is None
    assert facts.missing == ()
    assert facts.backbone is not None
    assert len(facts.backbone.report.layers) == 14
    assert facts.backbone.grid.kinds[0] == "q_proj"
    assert len(facts.backbone.spectra) == 3
    assert facts.backbone.config["bits"] == 2
    assert {kept["reason"] for kept in facts.backbone.kept} == {"embedding", "output head"}


def test_a_run_gives_training_and_backbone(run: Path) -> None:
    facts = collect(run)
    assert facts.backbone is not None
    assert facts.training is not None
    assert facts.model == "org/model"
    assert facts.training.memory == MEMORY["predicted"]
    assert facts.training.measured_peak == MEMORY["measured_peak"]
    assert facts.training.data == DATA
    assert [sample["after"] for sample in facts.training.samples] == [x["after"] for x in SAMPLES]
    assert facts.missing == ()


def test_without_the_source_there_are_no_spectra_but_a_reason(packed: Path) -> None:
    record = json.loads((packed / "loftq.json").read_text())
    edit(packed / "loftq.json", source={**record["source"], "name": "/gone/model"})
    backbone = collect(packed).backbone
    assert backbone is not None
    assert backbone.spectra == ()
    assert backbone.no_spectra == "the source, /gone/model, is not on this machine"


def test_chosen_layers_are_shown_in_their_order(packed: Path) -> None:
    chosen = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"]
    backbone = collect(packed, layers=chosen).backbone
    assert backbone is not None
    assert [spectrum.module for spectrum in backbone.spectra] == chosen


def test_notes_of_layers_are_collected(packed: Path) -> None:
    record = json.loads((packed / "loftq.json").read_text())
    record["layers"][3]["notes"] = ["fell back to plain rounding"]
    (packed / "loftq.json").write_text(json.dumps(record))
    backbone = collect(packed).backbone
    assert backbone is not None
    assert backbone.notes == ((record["layers"][3]["name"], "fell back to plain rounding"),)


def test_a_damaged_output_shows_its_problems(packed: Path) -> None:
    record = json.loads((packed / "loftq.json").read_text())
    del record["tensors"]["model.norm.weight"]
    (packed / "loftq.json").write_text(json.dumps(record))
    backbone = collect(packed).backbone
    assert backbone is not None
    assert "model.norm.weight" in backbone.report.problems[0]
    assert backbone.no_spectra == "the files of the output are damaged"


def test_what_a_run_lacks_is_listed(run: Path) -> None:
    (run / "samples.json").write_text("[")
    (run / "data.json").unlink()
    (run / "memory.json").write_text("[]")
    (run / "metrics.jsonl").write_text("{\n")
    facts = collect(run)
    assert facts.training is not None
    assert facts.training.samples == ()
    text = "\n".join(facts.missing)
    for words in (
        "samples.json cannot be read",
        "data.json is not in the run",
        "memory.json holds something else",
        "metrics.jsonl holds no step",
        "1 unreadable line",
    ):
        assert words in text


def test_a_run_whose_backbone_is_gone_still_has_a_page(run: Path) -> None:
    edit(run / "base.json", path="/gone/out")
    facts = collect(run)
    assert facts.backbone is None
    assert facts.training is not None
    assert "/gone/out: no such folder" in facts.missing[0]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no loftq\.json"):
        collect(tmp_path)


def test_half_a_run_says_what_it_lacks(run: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(run, tmp_path / "half"))
    (half / "base.json").unlink()
    with pytest.raises(ValueError, match=r"base\.json"):
        collect(half)
