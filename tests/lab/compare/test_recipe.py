"""Comparisons as files: what they say, and what is refused."""

import pytest

from loftq.lab.compare.arms import parse_arm
from loftq.lab.compare.cells import cells
from loftq.lab.compare.recipe import known_recipes, load_recipe, read_recipe

TEXT = """# A comparison for tests.
model: org/model
tasks:
  rte: {epochs: 2}
  cola: {}
methods: [full, lora16, qlora, "loftq:iters=1"]
formats: [nf2-g64, 2.5]
ranks: [8, 16]
seeds: 2
training: {batch_size: 4, epochs: 3}
rules:
  - when: {task: rte, format: 2.5}
    learning_rate: 1.0e-3
  - when: {method: [full, lora16]}
    learning_rate: 5.0e-5
published:
  - source: somewhere
    columns: {rte: accuracy, cola: [matthews, accuracy]}
    rows:
      - {method: qlora, format: 2.5, rank: 8, rte: 50.70, cola: N.A.}
"""


def test_a_matrix_has_a_cell_for_each_combination_that_means_something() -> None:
    found = cells(read_recipe("test", TEXT))
    lines = {cell.line for cell in found}
    assert lines == {
        ("full", None, None),
        *(("lora16", None, rank) for rank in (8, 16)),
        *(
            (method, format, rank)
            for method in ("qlora", "loftq:iters=1")
            for format in ("nf2-g64", "2.5")
            for rank in (8, 16)
        ),
    }
    assert len(found) == len(lines) * 2 * 2  # tasks, seeds
    assert len({cell.name for cell in found}) == len(found)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


def test_options_go_from_the_general_to_the_particular() -> None:
    found = {(c.task, c.line): c.options for c in cells(read_recipe("test", TEXT)) if c.seed == 0}
    assert found["rte", ("qlora", "2.5", 8)] == {
        "batch_size": 4, "epochs": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    assert found["cola", ("qlora", "2.5", 8)] == {"batch_size": 4, "epochs": 3}
    assert found["rte", ("full", None, None)]["learning_rate"] == 5e-5
    assert found["cola", ("loftq:iters=1", "2.5", 8)]["iters"] == 1


def test_seeds_and_tasks_share_a_backbone_and_nothing_else_does() -> None:
    found = cells(read_recipe("test", TEXT))
    shared: dict[object, set[object]] = {}
    for cell in found:
        shared.setdefault(cell.line, set()).add(cell.backbone)
    assert all(len(names) == 1 for names in shared.values())
    assert shared["full", None, None] == {None}
    names = [name for (name,) in shared.values() if name is not None]
    assert len(set(names)) == len(names) == 8


def test_a_format_may_be_a_number_of_bits() -> None:
    by_line = {cell.line: cell.quantization for cell in cells(read_recipe("test", TEXT))}
    assert by_line["qlora", "2.5", 8] == {"method": "qlora", "rank": 8, "bits": 2.5}
    assert by_line["qlora", "nf2-g64", 8]["format"] == "nf2-g64"


def test_published_numbers_keep_their_digits() -> None:
    (row,) = read_recipe("test", TEXT).published
    assert row.scores == {"rte": {"accuracy": "50.70"}, "cola": None}


def test_axes_and_options_can_be_given_in_place_of_the_recipes() -> None:
    changed = read_recipe("test", TEXT).changed(
        methods=["qlora"], tasks=["rte"], seeds=1, ranks=(4,), options={"learning_rate": 1.0}
    )
    found = cells(changed)
    assert [cell.line for cell in found] == [("qlora", "nf2-g64", 4), ("qlora", "2.5", 4)]
    assert all(cell.options["learning_rate"] == 1.0 for cell in found)


def test_further_cells_stand_beside_the_matrix_and_go_when_its_axes_are_given() -> None:
    text = TEXT + "more:\n  - {methods: [loftq], formats: [nf4], ranks: [4], seeds: 1}\n"
    recipe = read_recipe("test", text)
    extra = [cell for cell in cells(recipe) if cell.line == ("loftq", "nf4", 4)]
    assert [(cell.task, cell.seed) for cell in extra] == [("rte", 0), ("cola", 0)]
    given = recipe.changed(methods=["qlora"])
    assert not any(cell.arm.name == "loftq" for cell in cells(given))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("methods:", "method:", "unknown key 'method'. Did you mean methods"),
        ("model: org/model", "", "model is missing"),
        ("[full, lora16, qlora", "[ful, qlora", "unknown method 'ful'. Did you mean full"),
        ("seeds: 2", "seeds: 0", "seeds=0: must be at least 1"),
        ("formats: [nf2-g64, 2.5]", "", "methods that quantize need formats"),
        ("when: {task: rte, format", "when: {tusk: rte, format", "'tusk' is no axis"),
        ("rte: 50.70", "rte: 50.7/3", "rte has 1 metrics, found 50.7/3"),
        ("seeds: 2", "version: 7", "version 7 is not 1"),
        ("iters=1", "iters", "'iters' is not key=value"),
    ],
)
def test_a_bad_recipe_is_refused(old: str, new: str, problem: str) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=problem.replace("[", r"\[")):
        read_recipe("test", TEXT.replace(old, new))


def test_an_option_that_cannot_matter_is_refused() -> None:
    assert parse_arm("lora16:weight_decay=0.1").options == {"weight_decay": 0.1}
    with pytest.raises(ValueError, match="full quantizes nothing, so iters changes nothing"):
        parse_arm("full:iters=1")


def test_an_unknown_comparison_or_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean llama2-7b-nf"):
        load_recipe("llama2-7b")
    with pytest.raises(ValueError, match="has no task 'mnli'"):
        read_recipe("test", TEXT).changed(tasks=["mnli"])


@pytest.mark.parametrize("name", known_recipes())
def test_a_packaged_comparison_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    lines = {cell.line for cell in cells(recipe)}
    assert recipe.architecture
    assert f"loftq lab compare {name} " in known_recipes()[name]
    for row in recipe.published:
        named = [
            line
            for line in lines
            if all(
                str(dict(zip(("method", "format", "rank"), line, strict=True)).get(axis)) == value
                for axis, value in row.where.items()
            )
        ]
        assert named, f"{row.where}: a published row of no line"
        assert set(row.scores) <= set(recipe.tasks)
