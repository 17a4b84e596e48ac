"""Importing loftq is light, and `loftq --help` answers at once."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import loftq

HELP_SECONDS = 0.5

IMPORT = """
import json, os, sys
modules, variables = set(sys.modules), dict(os.environ)
import loftq
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "changed": dict(os.environ) != variables,
}))
"""

# Seconds of processor time since the interpreter started: what a clock shows on an idle machine,
# and unlike a clock the same while other tests run beside this one.
HELP = """
import atexit, runpy, sys, time
atexit.register(lambda: print(time.process_time(), file=sys.stderr))
sys.argv = ["loftq", "--help"]
runpy.run_module("loftq", run_name="__main__")
"""


def python(code: str) -> str:
    """What a fresh interpreter prints on running `code`."""
    return subprocess.check_output([sys.executable, "-c", code], text=True)


def test_import_loads_only_the_standard_library_and_sets_no_variable() -> None:
    seen = json.loads(python(IMPORT))
    assert set(seen["modules"]) - set(sys.stdlib_module_names) == {"loftq"}
    assert not seen["changed"]


def test_the_public_names_all_exist() -> None:
    missing = [name for name in loftq.__all__ if not hasattr(loftq, name)]
    assert not missing
    assert set(loftq.__all__) <= set(dir(loftq))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'loftq' has no attribute 'quantise'"):
        loftq.quantise  # noqa: B018 - the access is the test


def test_help_takes_under_half_a_second(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's machine keeps compiled files
    seconds = []
    for _ in range(6):
        command = [sys.executable, "-c", HELP]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "quantize" in done.stdout
        seconds.append(float(done.stderr.splitlines()[-1]))
    typical = statistics.median(seconds[1:])  # the first run compiles
    assert typical < HELP_SECONDS, f"loftq --help takes {typical:.2f} s"
