"""`loftq`: the verbs, and how an error reaches the user.

Nothing here imports torch, so that `loftq --help` answers at once; the verbs import what they call.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from loftq import __version__
from loftq.cli.chat import chat
from loftq.cli.doctor import doctor
from loftq.cli.eval import app as eval_app
from loftq.cli.export import export
from loftq.cli.inspect import inspect
from loftq.cli.lab import app as lab_app
from loftq.cli.plan import plan
from loftq.cli.quantize import quantize
from loftq.cli.train import train

FAILED = 1
TRACEBACK = "--traceback"
EXPECTED = (ValueError, OSError)
"""What the library raises for a caller's mistake; anything else is a bug of ours and is shown."""

app = typer.Typer(
    name="loftq",
    help="Pretrained models in really-packed 4, 3 and 2 bits, with the LoRA adapters that belong "
    "to them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help in colours would take twice the time to import
    pretty_exceptions_enable=False,
)
app.command(short_help="Say what quantizing would take and give; reads headers only.")(plan)
app.command(short_help="Quantize a model: packed weights and the adapter start.")(quantize)
app.command(short_help="Fine-tune a model, packed or not, on your own data.")(train)
app.add_typer(
    eval_app, name="eval", short_help="Score a model: tasks, perplexity, what `--to lora` costs."
)
app.command(short_help="Talk to a run or an output.")(chat)
app.command(short_help="Lay an output out for another engine.")(export)
app.command(short_help="Show what an output holds, and verify it.")(inspect)
app.command(short_help="Check this machine: packages, GPU, disk, memory.")(doctor)
app.add_typer(lab_app, name="lab", short_help="Experiments: comparisons, the demo, recipes.")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"loftq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say which version."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show where an error comes from; works anywhere.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is success, 1 an error (one message on stderr) or a check that failed, 2 a mistake in the
    command itself, 130 an interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        with warnings.catch_warnings():
            # What libraries tell their callers of coming changes is nothing a user could act on.
            warnings.simplefilter("ignore", FutureWarning)
            app(args=words, prog_name="loftq")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else FAILED
    except EXPECTED as error:
        if show:
            raise
        return _failed(str(error) or type(error).__name__)
    except ModuleNotFoundError as error:
        if show or (error.name or "").partition(".")[0] == "loftq":
            raise
        return _failed(f"{error}. `loftq doctor` lists what is installed and what is missing.")
    finally:
        warnings.formatwarning = before
    return 0


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning for people: without the line of code that gave it."""
    return f"warning: {message}\n"


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return FAILED
