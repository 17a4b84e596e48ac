#!/usr/bin/env python3
"""From a fresh clone to a running loftq, with nothing but Python 3.10 or newer.

    python3 bootstrap.py demo [ARGS]   install what the demo needs, then `loftq lab demo ARGS`
    python3 bootstrap.py test          install what the checks need, then run them all
    python3 bootstrap.py setup         install what the checks need, and stop
    python3 bootstrap.py lint          ruff and mypy
    python3 bootstrap.py format        let ruff mend what it can

Everything is installed in the folder .venv beside this file, and again only when pyproject.toml or
requirements/ has changed. What will be downloaded is said before it is. Without an NVIDIA driver
torch is pinned to the version whose CPU build was tested; with one it is not, and a torch that this
Python already has is used as it is. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) hold.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
OLDEST = HERE / ".venv-oldest"
REQUIREMENTS = HERE / "requirements"
EXTRA_OF = {"demo": "demo", "test": "dev", "setup": "dev", "lint": "dev", "format": "dev"}

# Megabytes (download, on disk), measured on Linux x86-64 with Python 3.11, but for torch with CUDA,
# which differs from release to release. The extras are without torch.
TORCH_CPU = (190, 870)
TORCH_CUDA = (2800, 5300)
PACKAGES = {"demo": (60, 310), "dev": (265, 1040)}
OLDEST_PACKAGES = (13, 130)

# `-m` replaces the one in pyproject.toml, so this says it again.
ON_CPU_OFFLINE = "not gpu and not multi_gpu and not slow and not network"


class SetupError(Exception):
    """Something the reader can mend; shown without a traceback."""


def main(argv: list) -> int:
    """Run one verb of the command line; returns the exit status."""
    if sys.version_info < (3, 10):
        raise SetupError(
            "loftq needs Python 3.10 or newer; this is {}.{}.\n"
            "Start it with a newer one: python3.12 bootstrap.py, or make PYTHON=python3.12.".format(
                *sys.version_info[:2]
            )
        )
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    verb, arguments = argv[0], argv[1:]
    if verb not in EXTRA_OF:
        raise SetupError(f"unknown command {verb!r}; choose {', '.join(EXTRA_OF)}.")
    if arguments and verb != "demo":
        raise SetupError(f"{verb} takes no arguments, found {' '.join(arguments)!r}.")
    install(EXTRA_OF[verb], verb)
    if verb == "demo":
        return run([python_of(VENV), "-m", "loftq", "lab", "demo", *arguments])
    if verb == "test":
        install_oldest()
        return check(lint_steps() + test_steps())
    if verb == "lint":
        return check(lint_steps())
    if verb == "format":
        return check(
            [("ruff check --fix", ruff("check", "--fix")), ("ruff format", ruff("format"))]
        )
    print(f"\n{VENV.name} is ready: {activation()}")
    return 0


# Installing


def install(extra: str, verb: str) -> None:
    """Make .venv hold loftq (editable) with `extra`, unless its stamp says that it does."""
    gpu = nvidia_driver()
    constraints = REQUIREMENTS / ("constraints-tested.txt" if gpu else "constraints-cpu.txt")
    fingerprint = fingerprint_of(gpu)
    installed = read_stamp(VENV)
    extras = set(installed["extras"]) if installed.get("fingerprint") == fingerprint else set()
    if extra in extras:
        return
    shared_torch = gpu and own_torch()
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"loftq: setting up {VENV.name} for `{verb}`, with Python {version}")
    print(f"  {'NVIDIA driver found: ' + gpu if gpu else 'no NVIDIA driver found: CPU only'}")
    (VENV / STAMP).unlink(missing_ok=True)  # from here on it is incomplete
    make_venv(shared_torch)
    announce(extra, constraints, gpu)
    start = time.monotonic()
    extras.add(extra)
    target = f"{HERE}[{','.join(sorted(extras))}]"
    pip(VENV, "install", "-c", str(constraints), "-e", target)
    write_stamp(VENV, {"fingerprint": fingerprint, "extras": sorted(extras)})
    print(f"  installed in {time.monotonic() - start:.0f} s\n", flush=True)


def install_oldest() -> None:
    """Make .venv-oldest: .venv seen through the packages of requirements/oldest.txt."""
    pins = REQUIREMENTS / "oldest.txt"
    base = read_stamp(VENV)
    stamp = {"base": base, "pins": hashlib.sha256(pins.read_bytes()).hexdigest()}
    if read_stamp(OLDEST) == stamp:
        return
    names = [line.split()[0] for line in pins.read_text().splitlines() if line[:1].isalpha()]
    download, disk = OLDEST_PACKAGES
    print(f"loftq: setting up {OLDEST.name}, the low end of the supported versions")
    print(f"  {', '.join(names)}: about {download} MB to download, {disk} MB on disk")
    shared = "include-system-site-packages = true" in (VENV / "pyvenv.cfg").read_text()
    flags = ["--without-pip", "--clear"] + (["--system-site-packages"] if shared else [])
    subprocess.run([python_of(VENV), "-m", "venv", *flags, str(OLDEST)], check=True)
    site = site_packages(OLDEST)
    # .venv's packages (pip among them) come after this environment's own. The path files in there
    # are not read from here, so src, which one of them names, is named again.
    (site / "base.pth").write_text(f"{site_packages(VENV)}\n{HERE / 'src'}\n")
    pip(OLDEST, "install", "--no-deps", "--ignore-installed", "-r", str(pins))
    write_stamp(OLDEST, stamp)
    print()


def make_venv(shared_torch: bool) -> None:
    """Create .venv, or keep the one there if its Python still runs and is this version."""
    probe = [python_of(VENV), "-c", "import sys; print(sys.version_info[:2] == %r)"]
    probe[2] %= (tuple(sys.version_info[:2]),)
    try:
        if subprocess.run(probe, capture_output=True, text=True).stdout.strip() == "True":
            return
    except OSError:
        pass  # not there, or its interpreter has gone
    flags = ["--clear"] + (["--system-site-packages"] if shared_torch else [])
    made = subprocess.run(
        [sys.executable, "-m", "venv", *flags, str(VENV)], capture_output=True, text=True
    )
    if made.returncode:
        raise SetupError(
            f"python -m venv failed:\n{(made.stdout + made.stderr).strip()}\n"
            "Install Python's venv and ensurepip modules; on Debian and Ubuntu: "
            "apt-get install python3-venv."
        )


def announce(extra: str, constraints: Path, gpu: str) -> None:
    """Say what is about to be downloaded, how big it is, and whether the disk holds it."""
    what, (download, disk) = torch_choice(constraints, gpu)
    print(f"  {what}")
    more_download, more_disk = PACKAGES[extra]
    print(f"  loftq[{extra}] with its other packages: about {more_download} MB to download")
    total = download + more_download
    print(f"  together about {total} MB to download, {disk + more_disk} MB on disk", flush=True)
    if extra == "demo":
        print("  afterwards the demo fetches its model, about 95 MB, once")
    free = shutil.disk_usage(HERE).free // 10**6
    if free < disk + more_disk:
        raise SetupError(
            f"{HERE}: {free} MB free, about {disk + more_disk} MB needed. Free some space first."
        )


def torch_choice(constraints: Path, gpu: str) -> tuple:
    """Ask pip which torch it would take: a sentence, and its (download, disk) megabytes."""
    options = ["--dry-run", "--no-deps", "--quiet", "--report", "-", "-c", str(constraints)]
    command = [python_of(VENV), "-m", "pip", "install", *options, "torch>=2.11"]
    report = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(report.stdout)["install"]
    except (ValueError, KeyError):  # an old pip, or no index: pip's own words follow on the install
        return "torch: pip cannot say beforehand which build it will take", TORCH_CPU
    if not found:
        return "torch: already installed, kept as it is", (0, 0)
    metadata, url = found[0]["metadata"], found[0]["download_info"]["url"]
    cuda = any("nvidia" in need or "cuda" in need for need in metadata.get("requires_dist", []))
    download, disk = TORCH_CUDA if cuda else TORCH_CPU
    build = "with its CUDA libraries" if cuda else "CPU build"
    what = f"torch {metadata['version']}, {build}: "
    if url.startswith("file:"):
        return what + "a file on this machine, nothing to download", (0, disk)
    what += f"about {download} MB to download"
    if cuda and not gpu:
        what += (
            "\n    pip sees no CPU build. It works, but is far larger than this machine needs: to"
            "\n    stop, press Ctrl-C, let pip see PyTorch's index of CPU builds through"
            "\n    PIP_EXTRA_INDEX_URL, and run the same command again"
        )
    return what, (download, disk)


def pip(venv: Path, *arguments: str) -> None:
    """Run pip in `venv`; shows its larger downloads, and its last words if it fails."""
    command = [python_of(venv), "-m", "pip", *arguments]
    lines = []
    with subprocess.Popen(
        [*command, "--progress-bar", "off", "--disable-pip-version-check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            name = line.split()[1:2]
            if line.lstrip().startswith("Downloading") and line.rstrip().endswith(("MB)", "GB)")):
                print(f"  downloading {name[0].split('/')[-1]} {line[line.rindex('(') :].rstrip()}")
            elif line.startswith("Installing collected"):
                print(f"  installing {line.count(',') + 1} packages", flush=True)
    if process.returncode:
        last = "\n".join("    " + line for line in lines[-15:])
        raise SetupError(
            f"pip could not install what is needed; its last lines:\n{last}\n"
            "Mend the cause (network, proxy, disk space, Python version) and "
            "run the same command again."
        )


def nvidia_driver() -> str:
    """Where an NVIDIA driver was seen, or the empty string."""
    smi = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"  # not on every WSL2 PATH
    return next((path for path in ("/proc/driver/nvidia/version", smi) if os.path.exists(path)), "")


def own_torch() -> bool:
    """Whether the Python that runs this has a torch that loftq can use."""
    from importlib import metadata  # not in Python 3.7, which must get as far as the first check

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= (2, 11)


# Stamps and paths

STAMP = "loftq-stamp.json"


def fingerprint_of(gpu: str) -> str:
    """Changes whenever an installed .venv would no longer be what this checkout asks for."""
    digest = hashlib.sha256(f"{HERE}\n{sys.version}\n{bool(gpu)}\n".encode())
    for path in [HERE / "pyproject.toml", *sorted(REQUIREMENTS.glob("constraints-*.txt"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict:
    """What the last finished installation wrote, or an empty dict."""
    try:
        return json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, stamp: dict) -> None:
    """Say that the installation is finished."""
    (venv / STAMP).write_text(json.dumps(stamp, indent=1))


def python_of(venv: Path) -> str:
    """The interpreter of an environment."""
    return str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def site_packages(venv: Path) -> Path:
    """The folder where an environment keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python_of(venv), "-c", code], text=True).strip())


def activation() -> str:
    """How to enter .venv from a shell."""
    return r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"


# Checking


def ruff(*arguments: str) -> list:
    """A ruff command over the whole checkout."""
    return [python_of(VENV), "-m", "ruff", *arguments]


def lint_steps() -> list:
    """What reads the code without running it, as (name, command)."""
    return [
        ("ruff check", ruff("check")),
        ("ruff format", ruff("format", "--check")),
        ("mypy", [python_of(VENV), "-m", "mypy"]),
    ]


def test_steps() -> list:
    """The tests, as (name, command): the compat ones on the oldest transformers, then all."""
    options = ["-n", str(min(4, os.cpu_count() or 1)), "--durations=10", "--durations-min=10"]
    compat = ["-m", f"compat and {ON_CPU_OFFLINE}"]
    return [
        ("pytest, oldest", [python_of(OLDEST), "-m", "pytest", *options, *compat]),
        ("pytest", [python_of(VENV), "-m", "pytest", *options]),
    ]


def check(steps: list) -> int:
    """Run every step, visibly, then say how each went; 1 if any failed."""
    rows = []
    for name, command in steps:
        print(f"--- {name}: {shown(command)}", flush=True)
        start = time.monotonic()
        status = run(command)
        rows.append((name, status, time.monotonic() - start, command))
        print(flush=True)
    failed = [row for row in rows if row[1]]
    for name, status, seconds, _ in rows:
        print(f"{name:<16}{'FAILED' if status else 'ok':<8}{seconds:6.0f} s")
    for name, status, _, command in failed:
        print(f"{name} ended with status {status}. To see it again: {shown(command)}")
    print(f"{len(failed)} of {len(rows)} checks failed." if failed else "All checks passed.")
    return 1 if failed else 0


def shown(command: list) -> str:
    """A command as one would type it in this folder."""
    words = [os.path.relpath(command[0], HERE), *command[1:]]
    return " ".join(f'"{word}"' if " " in word else word for word in words)


def run(command: list) -> int:
    """Run a command in this folder with everything it prints visible; its exit status."""
    return subprocess.run(command, cwd=HERE).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as problem:
        sys.exit(f"loftq: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
