"""`loftq export`: a packed model in the layout of the engine that is to serve it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options
from loftq.cli.gap import measure, show

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.integrations.export import Exported


def _size(value: str) -> int:
    try:
        return options.byte_count(options.SHARD_BYTES, value)
    except ValueError:
        raise ValueError("expected bytes, such as 5GB or 500MB") from None


KEYS: dict[str, Any] = {
    "adapter": str,
    "base": str,
    "dtype": str,
    "vocab": str,
    options.SHARD_BYTES: _size,
}
"""KEY=VALUE words -> their parsers."""


def export(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="RUN of `loftq train`, or OUT of `loftq quantize` (the start)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to make; it appears when complete.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="adapter=FOLDER; base=MODEL (lora); dtype=bfloat16 (dense); vocab=FILE.gguf "
            "(gguf); max_shard_bytes=2GB.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="bnb, gptq, compressed-tensors, gguf, lora or dense."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--for", help="transformers, vllm or llama.cpp: picks the layout."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="With --to lora: held-out text, to measure what the move costs."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Lay PATH out for another engine without rounding again; refuses what would lose anything.

    Everything written is read back and compared with the source before FOLDER appears. lora is the
    training as an adapter for the original model, dense an ordinary model merged from the packed
    one: these two take any format.
    """
    chosen = options.parse_pairs(settings or (), KEYS)
    found = None
    with console.answering(as_json=as_json):
        from loftq.cli.progress import Bar
        from loftq.integrations.export import export as run

        _check_data(to, data)
        with Bar(console.side_screen(), "exported") as bar:
            done = run(
                path,
                output=output,
                to=to,
                engine=engine,
                overwrite=overwrite,
                on_step=bar.update,
                **chosen,
            )
        if data is not None:
            found = measure(path, output, data, adapter=chosen.get("adapter"), device=None)
    if as_json:
        console.emit({**done.to_dict(), "gap": found and found.to_dict()})
        return
    _print(console.screen(), done)
    if found is not None and data is not None:
        console.screen().print()
        show(found, data)


def _check_data(to: str | None, data: Path | None) -> None:
    if data is None:
        return
    if to != "lora":
        raise ValueError(
            "--data measures what --to lora costs on the original model; leave it out here, or "
            "score with `loftq eval ppl`."
        )
    if not data.is_file():
        raise ValueError(f"{data}: no such file.")
    from loftq.eval import read_text

    read_text(data)  # before the work, not after it


def _print(out: Console, done: Exported) -> None:
    lines = console.facts()
    lines.add_row(
        "wrote",
        f"{done.folder}: {console.size(done.nbytes)} in {console.count(len(done.files), 'file')}, "
        f"{console.duration(done.seconds)}",
    )
    lines.add_row("checked", f"{console.count(done.compared, 'tensor')} equal to the source")
    for limit in done.limits:
        lines.add_row("limit", limit)
    out.print(lines)
    for place in done.serve:
        out.print(f"\nserve with {place.engine}:")
        for line in place.command.split("; "):
            out.print(f"  {line}", soft_wrap=True)  # to be copied: no folding
