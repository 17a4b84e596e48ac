"""PEFT's own tests on packed models (tests/peft_conformance); needs PEFT's repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "peft_conformance" / "run.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_listed_tests_of_peft_pass_on_packed_models():
    checkout = os.environ.get("LOFTQ_PEFT_SOURCE")
    if not checkout:
        pytest.skip("LOFTQ_PEFT_SOURCE is not set: PEFT's repository at the commit in ids.txt")
    done = subprocess.run([sys.executable, RUN, checkout], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
