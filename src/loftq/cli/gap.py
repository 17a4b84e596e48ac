"""`loftq eval gap`: what an adapter made by `export --to lora` costs on the original model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from loftq.eval import LossGap


def gap(
    path: Annotated[
        str, typer.Argument(metavar="RUN", help="What was exported: a RUN, or an OUT of quantize.")
    ],
    exported: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="Folder that `export --to lora` made.")
    ],
    data: Annotated[Path, typer.Option(help="Held-out text: .txt, .raw or .jsonl, also .gz.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="dtype=auto (float32, bfloat16, ...)."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first windows. Default: all.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder, as it was given to export.")
    ] = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Loss of the packed model with its adapter, and of the original with EXPORT, on one text."""
    chosen = options.parse_pairs(settings or (), {"dtype": options.dtype_name})
    with console.answering(as_json=as_json):
        found = measure(
            path, exported, data, adapter=adapter, context=context, windows=windows,
            device=device, **chosen,
        )  # fmt: skip
    if as_json:
        console.emit({**found.to_dict(), "data": data.name})
    else:
        show(found, data)


def measure(path: str, exported: Path, data: Path, *, device: str | None, **chosen: Any) -> LossGap:
    """Read the text with the model's own tokenizer and score both models."""
    from transformers import AutoTokenizer

    from loftq.cli.progress import Bar
    from loftq.eval import encode, lora_gap, read_text
    from loftq.integrations.device import check_device, default_device
    from loftq.integrations.export import open_source

    name = device or default_device()
    check_device(name)
    text = read_text(data)
    folder = open_source(path, adapter=chosen.get("adapter")).folder
    ids = encode(AutoTokenizer.from_pretrained(folder), text)
    with Bar(console.side_screen(), "windows") as bar:
        return lora_gap(
            path, exported, ids, device=name,
            on_window=lambda n, total, value: bar.update(n, total, f"perplexity {value:.2f}"),
            **chosen,
        )  # fmt: skip


def show(found: LossGap, data: Path) -> None:
    """Both losses and their difference; a warning where it is large."""
    out = console.screen()
    out.print(f"loss of the packed model    {found.packed:.4f} nats a token")
    out.print(f"loss on the original model  {found.original:.4f} nats a token")
    out.print(
        f"gap {found.gap:+.4f} over {found.tokens:,} predicted tokens of {data.name}, "
        f"context {found.context}"
    )
    if found.warning:
        out.print(f"warning: {found.warning}")
