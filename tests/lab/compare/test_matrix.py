"""The matrix without models: rows that are kept, failures that stay where they are, locks."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loftq.checkpoint.durable import ProcessLock
from loftq.lab.compare.cells import Cell, cells
from loftq.lab.compare.matrix import Learnt, run_comparison
from loftq.lab.compare.recipe import CompareRecipe
from loftq.lab.compare.store import Bytes
from loftq.train.errors import Diverged

RECIPE = CompareRecipe(
    name="test",
    purpose="A comparison for tests.",
    model="org/model",
    tasks={"rte": {}, "cola": {"epochs": 2}},
    methods=["qlora", "loftq", "full"],
    formats=("nf2-g64",),
    ranks=(4,),
    seeds=3,
)
SCORES = {"qlora": 0.5, "loftq": 0.6, "full": 0.7}


@dataclass
class Clerk:
    """Writes down what it is asked for, and answers with made-up scores."""

    device: str = "cpu"
    learnt: list[str] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)
    fails: dict[str, Exception] = field(default_factory=dict)

    def quantize(self, cell: Cell, backbone: Path) -> None:
        backbone.mkdir(parents=True)
        (backbone / "config.json").write_text("{}")
        self.quantized.append(backbone.name)

    def learn(self, cell: Cell, run: Path, backbone: Path | None) -> Learnt:
        assert backbone is None or (backbone / "config.json").is_file()
        self.learnt.append(cell.name)
        if cell.name in self.fails:
            raise self.fails[cell.name]
        (run / "checkpoints").mkdir(parents=True)
        return Learnt(
            metrics={"accuracy": SCORES[cell.arm.name] + cell.seed / 100},
            primary="accuracy",
            greater_is_better=True,
            interval=(0.4, 0.8),
            bits_per_weight=2.1 if cell.arm.quantizes else 16.0,
            bytes=Bytes(packed=10, dense=20, trained=30),
            seconds={"training": 2.0},
            steps=3,
            examples=100,
        )


def test_every_cell_is_trained_once_on_backbones_that_are_shared(tmp_path: Path) -> None:
    clerk = Clerk()
    found = run_comparison(RECIPE, tmp_path / "out", clerk)
    assert clerk.learnt == [cell.name for cell in cells(RECIPE)]
    assert len(clerk.quantized) == 2
    assert not list((tmp_path / "out").glob("runs/*/checkpoints"))
    by_line = {(s.line[0], s.task): s for s in found.summaries}
    assert by_line["loftq", "rte"].median == pytest.approx(0.61)
    assert by_line["loftq", "rte"].spread == pytest.approx((0.6, 0.62))
    again = Clerk()
    table = (tmp_path / "out/table.md").read_text()
    run_comparison(RECIPE, tmp_path / "out", again)
    assert again.learnt == []
    assert (tmp_path / "out/table.md").read_text() == table


def test_a_failure_stays_in_its_cell_until_it_is_tried_again(tmp_path: Path) -> None:
    names = [cell.name for cell in cells(RECIPE)]
    clerk = Clerk(fails={names[0]: OSError("disk on fire"), names[1]: Diverged("loss is nan")})
    found = run_comparison(RECIPE, tmp_path / "out", clerk)
    assert len(clerk.learnt) == len(names)
    lost = {row.cell: (row.status, row.error) for row in found.rows if row.status != "done"}
    assert lost[names[1]] == ("diverged", "loss is nan")
    assert lost[names[0]][0] == "failed"
    assert "OSError: disk on fire" in str(lost[names[0]][1])
    table = (tmp_path / "out/table.md").read_text()
    assert f"- `{names[0]}` failed: OSError: disk on fire" in table
    again = Clerk()
    run_comparison(RECIPE, tmp_path / "out", again)
    assert again.learnt == []
    found = run_comparison(RECIPE, tmp_path / "out", again, retry=True)
    assert again.learnt == names[:2]
    assert {row.status for row in found.rows} == {"done"}


def test_an_interruption_is_no_failure(tmp_path: Path) -> None:
    names = [cell.name for cell in cells(RECIPE)]
    clerk = Clerk(fails={names[2]: KeyboardInterrupt()})  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        run_comparison(RECIPE, tmp_path / "out", clerk)
    again = Clerk()
    run_comparison(RECIPE, tmp_path / "out", again)
    assert again.learnt == names[2:]


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    first = cells(RECIPE)[0].name
    (tmp_path / "out/locks").mkdir(parents=True)
    lock = ProcessLock(tmp_path / "out/locks" / first)
    found = run_comparison(RECIPE, tmp_path / "out", clerk := Clerk())
    assert first not in clerk.learnt
    assert len(found.rows) == len(found.cells) - 1
    lock.release()
    found = run_comparison(RECIPE, tmp_path / "out", clerk := Clerk())
    assert clerk.learnt == [first]
    assert len(found.rows) == len(found.cells)


def test_more_methods_and_seeds_keep_the_rows_that_are_there(tmp_path: Path) -> None:
    run_comparison(RECIPE.changed(seeds=1, methods=["qlora"]), tmp_path / "out", Clerk())
    clerk = Clerk()
    found = run_comparison(RECIPE, tmp_path / "out", clerk)
    assert len(clerk.learnt) == len(found.cells) - 2
    assert len(found.rows) == len(found.cells)


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    run_comparison(RECIPE, tmp_path / "out", Clerk())
    changed = RECIPE.changed(options={"epochs": 9})
    with pytest.raises(ValueError, match=r"other settings \(epochs: None then, 9 now\)"):
        run_comparison(changed, tmp_path / "out", Clerk())
    with pytest.raises(ValueError, match="holds the comparison test of org/model, and this is"):
        run_comparison(RECIPE.changed(model="other"), tmp_path / "out", Clerk())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds files and no comparison"):
        run_comparison(RECIPE, tmp_path, Clerk())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    run_comparison(RECIPE, tmp_path / "out", Clerk())
    path = next((tmp_path / "out/rows").glob("*.json"))
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=f"{path.name}: no row of a comparison"):
        run_comparison(RECIPE, tmp_path / "out", Clerk())


def test_the_machine_readable_table_holds_every_row(tmp_path: Path) -> None:
    run_comparison(RECIPE, tmp_path / "out", Clerk())
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert len(table["rows"]) == table["cells"] == 18
    row = table["rows"][0]
    assert row["machine"]["torch"]
    assert row["bytes"] == {"packed": 10, "dense": 20, "trained": 30}
    paired = {(d["line"][0], d["task"]): d for d in table["differences"]}
    assert paired["loftq", "rte"]["wins"] == 3
    assert paired["loftq", "rte"]["median"] == pytest.approx(0.1)
