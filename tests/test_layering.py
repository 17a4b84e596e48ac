"""The rooms of src/loftq and who may import whom, read from the source without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "loftq"

ORDER = (
    ("units",),
    ("ops",),
    ("formats",),
    ("checkpoint",),
    ("nn",),
    ("transforms",),
    ("rounding",),
    ("lowrank",),
    ("calibration",),
    ("schedules",),
    ("refine",),
    ("methods",),
    ("allocation",),
    ("pipeline",),
    ("integrations",),
    ("api",),
    ("train", "eval"),
    ("tasks",),
    ("report",),
    ("chat",),
    ("lab",),
    ("cli",),
    ("__main__", "run", "_startup"),
)
"""A room imports only from rooms of earlier rows; those of one row do not know each other."""

LEVEL = {room: level for level, row in enumerate(ORDER) for room in row}
MODEL_FREE = LEVEL["pipeline"]
"""Up to here nothing knows a model library."""
MODEL_LIBRARIES = {"transformers", "peft"}


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of whatever a module imports, in functions and type checking too.

    `from a import b` counts as a.b, since b may be a module; relative names are resolved.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant):
                yield node.lineno, str(named.value)


def violations(source: str, module: str) -> list[str]:
    """What a module of loftq imports against the order, as readable lines."""
    room = module.split(".")[1]
    if room not in LEVEL:
        return [f"{module}: {room} is no room; give it a place in ORDER and in the style guide"]
    found = []
    for line, name in imports(source, module):
        library, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if library in MODEL_LIBRARIES and LEVEL[room] <= MODEL_FREE:
            found.append(f"{module}:{line}: {room} must not know {library}")
        # The package's own names are those of api: rooms after it may use them as users do.
        too_late = LEVEL.get(target, LEVEL["api"]) >= LEVEL[room]
        if library == "loftq" and target not in (room, "__version__") and too_late:
            found.append(f"{module}:{line}: {room} must not import {target or 'loftq'}")
    return found


def is_lazy(node: ast.stmt) -> bool:
    """Whether a statement of a module imports nothing when the module is imported."""
    checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return checking or isinstance(node, ast.FunctionDef)


def modules() -> list[Path]:
    """All source files but the package's own __init__, which imports lazily from everywhere."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    """src/loftq/a/b.py -> loftq.a.b; __init__ is kept, so that relative names resolve."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_each_room_imports_only_from_rooms_above_it() -> None:
    files = modules()
    assert files, f"no source found in {PACKAGE}"
    found = [problem for path in files for problem in violations(path.read_text(), dotted(path))]
    assert not found, "\n".join(found)


def test_importing_the_package_runs_nothing_but_the_hook() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    tree.body = [node for node in tree.body if not is_lazy(node)]
    names = {name for _, name in imports(ast.unparse(tree), "loftq.__init__")}
    assert {name for name in names if name.startswith("loftq")} <= {"loftq.integrations._hook"}


def test_every_folder_of_modules_is_a_package() -> None:
    bare = {path.parent for path in modules() if not (path.parent / "__init__.py").exists()}
    assert not bare, f"left out of the wheel for want of an __init__.py: {sorted(map(str, bare))}"


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        (
            "loftq.ops.reference",
            "from loftq.formats import parse_format",
            "must not import formats",
        ),
        ("loftq.ops.reference", "from ..formats import parse_format", "must not import formats"),
        ("loftq.ops.__init__", "from .. import formats", "must not import formats"),
        ("loftq.ops.reference", "import loftq.formats.spec as s", "must not import formats"),
        ("loftq.ops.reference", "def f():\n    import transformers", "must not know transformers"),
        ("loftq.pipeline.run", "if TYPE_CHECKING:\n    from peft import X", "must not know peft"),
        ("loftq.pipeline.run", "import_module('peft.tuners')", "must not know peft"),
        ("loftq.pipeline.run", "from loftq import quantize", "must not import quantize"),
        ("loftq.api", "import loftq", "must not import loftq"),
        ("loftq.train.sft", "from loftq.eval import perplexity", "must not import eval"),
        ("loftq.utils.misc", "", "no room"),
    ],
)
def test_a_violation_is_found(module: str, source: str, problem: str) -> None:
    (found,) = violations(source, module)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loftq.ops.reference", "import torch\nfrom .schema import check\nfrom loftq.ops import x"),
        ("loftq.formats.spec", "from loftq.ops import dequantize"),
        ("loftq.integrations.peft", "import peft\nfrom loftq import __version__"),
        ("loftq.pipeline.run", "from transformers_stream import x"),
        ("loftq.lab.demo", "import loftq\nfrom loftq import quantize"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
