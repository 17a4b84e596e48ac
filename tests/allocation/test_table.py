"""The table of costs survives a kill, and says where it is damaged."""

import pytest

from loftq.allocation import CostTable


def test_what_was_added_is_read_back_and_gaps_are_known(tmp_path):
    path = tmp_path / "deep" / "costs.jsonl"
    table = CostTable(path)
    assert table.missing(["a", "b"], "nf2") == {"a", "b"}
    table.add("a", "nf2", 0.1)
    table.add("a", "nf4", 1 / 3)
    table.add("b", "nf2", 2.0)
    again = CostTable(path)
    assert again.costs == table.costs == {"a": {"nf2": 0.1, "nf4": 1 / 3}, "b": {"nf2": 2.0}}
    assert again.missing(["a", "b"], "nf4") == {"b"}


def test_a_line_torn_by_a_kill_is_measured_again(tmp_path):
    path = tmp_path / "costs.jsonl"
    CostTable(path).add("a", "nf2", 0.1)
    with path.open("a") as file:
        file.write('{"module": "b", "form')
    table = CostTable(path)
    assert table.missing(["a", "b"], "nf2") == {"b"}
    table.add("b", "nf2", 0.2)
    assert CostTable(path).costs == {"a": {"nf2": 0.1}, "b": {"nf2": 0.2}}


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "costs.jsonl"
    CostTable(path).add("a", "nf2", 0.1)
    with path.open("a") as file:
        file.write('nonsense\n{"module": "b", "format": "nf2", "cost": 1}\n')
    with pytest.raises(ValueError, match=r"costs.jsonl, line 3: damaged .*Remove the line"):
        CostTable(path)
    path.write_text('{"version": 9}\n')
    with pytest.raises(ValueError, match="not a table of costs of version 1"):
        CostTable(path)
