"""`loftq doctor` and `loftq lab`."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from loftq.methods import METHODS
from loftq.report import Check


def test_the_doctor_finds_this_machine_fit(loftq: Callable) -> None:
    answer = loftq("doctor")
    assert answer.code == 0
    assert "transformers" in answer.out
    report = loftq("doctor", "--json").json
    assert report["ok"]
    assert {"name", "status", "found", "advice"} == set(report["checks"][0])


def test_the_doctor_fails_when_loftq_cannot_work(
    loftq: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [Check(name="peft", status="fail", found="not installed", advice="pip install peft")]
    monkeypatch.setattr(sys.modules["loftq.report.doctor"], "doctor", lambda: broken)
    assert loftq("doctor").code == 1
    answer = loftq("doctor", "--json")
    assert (answer.code, answer.json["ok"]) == (1, False)


def test_all_methods_are_listed_with_their_papers(loftq: Callable) -> None:
    answer = loftq("lab", "methods")
    for method in METHODS.values():
        assert method.name in answer.out
        assert f"arXiv:{method.paper}" in answer.out
    assert "loftq-paper (reproduction)" in answer.out
    names = [method["name"] for method in loftq("lab", "methods", "--json").json["methods"]]
    assert names == list(METHODS)


def test_the_demo_is_given_its_arguments(loftq: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    demo = ModuleType("loftq.lab.demo")
    demo.run_demo = lambda **arguments: calls.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loftq.lab.demo", demo)
    assert loftq("lab", "demo").code == 0
    assert loftq("lab", "demo", "--model", "x", "--json").code == 0
    assert calls == [{"model": None, "as_json": False}, {"model": "x", "as_json": True}]


def test_the_doctor_builds_the_cpu_library_or_says_why_not(
    loftq: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "nothing++")
    answer = loftq("doctor", "--build")
    assert answer.code == 1
    assert answer.err.startswith("error: no C++ compiler: CXX=nothing++ is not a program")
    built = []
    monkeypatch.setattr("loftq.ops.cpu.build.build_library", lambda: built.append(1) or tmp_path)
    assert loftq("doctor", "--build").out.startswith(f"CPU library: {tmp_path}")
    assert loftq("doctor", "--build", "--json").json["ok"]
    assert len(built) == 2
