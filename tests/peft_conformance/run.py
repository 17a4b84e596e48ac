"""Run the listed tests of PEFT on models packed by loftq: `run.py PEFT_CHECKOUT [pytest options]`.

Exit code 0 only if every test in ids.txt passed. Needs pytest beside loftq's own dependencies.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
IDS = HERE / "ids.txt"


def main() -> int:
    """Check the checkout, run, and compare with the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="PEFT's repository at the commit in ids.txt")
    parser.add_argument(
        "--survey", action="store_true", help="run all LoRA tests of the files, not only the listed"
    )
    arguments, more = parser.parse_known_args()
    lines = IDS.read_text(encoding="utf-8").splitlines()
    ids = [line for line in lines if line and not line.startswith("#")]
    check_files(arguments.checkout, lines)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = pytest_command(report)
        if not arguments.survey:
            command.append(f"--loftq-ids={IDS}")
        files = sorted({line.split("::")[0] for line in ids})
        code = subprocess.call([*command, *more, *files], cwd=arguments.checkout, env=environment())
        if arguments.survey:
            return code
        total, passed = counts(report)
    print(f"{passed} of {len(ids)} listed tests passed, {total - passed} did not")
    return 0 if code == 0 and passed == total == len(ids) else 1


def check_files(checkout: Path, lines: list[str]) -> None:
    """Refuse test files other than those of the pinned commit."""
    for line in lines:
        if line.startswith("# sha256 "):
            digest, name = line.split()[2:]
            path = checkout / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise SystemExit(
                    f"{path}: not the file of the pinned commit ({lines[0].lstrip('# ')})"
                )


def pytest_command(report: Path) -> list[str]:
    """pytest without PEFT's own options: coverage, and errors for warnings of its callers."""
    plain = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider", "--rootdir=."]
    return [sys.executable, "-m", "pytest", "-q", "-p", "plugin", *plain, f"--junitxml={report}"]


def environment() -> dict[str, str]:
    """No hub, one thread, our plugin and the tiny models importable."""
    ours = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")]
    path = os.pathsep.join([*ours, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def counts(report: Path) -> tuple[int, int]:
    """Tests run, and those that passed: neither failed nor skipped nor expected to fail."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    bad = {"failure", "error", "skipped"}
    return len(cases), sum(not any(child.tag in bad for child in case) for case in cases)


if __name__ == "__main__":
    sys.exit(main())
