"""`loftq eval`: perplexity of a model, its scores on tasks, and what `--to lora` costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options
from loftq.cli.eval_task import add_tasks
from loftq.cli.gap import gap
from loftq.cli.harness import harness
from loftq.tasks.table import TASKS

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    help="Score a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=f"Tasks, as `loftq eval TASK PATH`: {', '.join(TASKS)}.",
)


@app.callback()
def _eval() -> None:
    """Score a model."""


app.command()(gap)
app.command()(harness)
add_tasks(app)


@app.command()
def ppl(
    path: options.Scored,
    data: Annotated[Path, typer.Option(help="Text: .txt, .raw (WikiText) or .jsonl, also .gz.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="batch=1 dtype=auto (float32, bfloat16, ...)."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="gptq, paper or word; their numbers do not compare.")
    ] = "gptq",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window. Default: 2048; of `paper` 1024.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first windows. Default: all.")
    ] = None,
    adapter: options.AdapterOf = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Perplexity by the protocol of the quantization papers; its parameters stand beside it."""
    chosen = options.parse_pairs(
        settings or (), {"batch": options.positive, "dtype": options.dtype_name}
    )
    with console.answering(as_json=as_json):
        from loftq.cli.progress import Bar
        from loftq.eval import protocol_perplexity, read_rows, split_of

        rows = read_rows(data)
        model, tokenizer, about = _load(path, adapter, device, chosen.get("dtype", "auto"))
        with Bar(console.side_screen(), "windows") as bar:
            result = protocol_perplexity(
                model,
                tokenizer,
                rows,
                protocol,
                context=context,
                windows=windows,
                batch=chosen.get("batch", 1),
                on_window=lambda n, total, value: bar.update(n, total, f"perplexity {value:.2f}"),
            )
    answer = {**result.to_dict(), "data": data.name, "split": split_of(data), **about}
    if as_json:
        console.emit(answer)
        return
    out = console.screen()
    unit = "word" if result.units != result.tokens else "token"
    out.print(f"perplexity {result.perplexity:.4f}  (nll {result.nll:.6f} nats a {unit})")
    out.print(
        f"  protocol {result.protocol}, context {result.context}, split {answer['split']} "
        f"({data.name}), {console.count(len(result.windows), 'window')}, "
        f"{result.tokens:,} predicted tokens"
    )
    out.print(f"  {path}, adapter {about['adapter']}, {about['dtype']} on {about['device']}")


def _load(
    path: str, adapter: str | None, device: str | None, dtype: str
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model with its adapter, its tokenizer, and what to say about them."""
    import sys

    from transformers.utils import logging

    from loftq.integrations.causal import open_causal

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    opened = open_causal(path, adapter=adapter, device=device, dtype=dtype, allow_bare=True)
    chosen = adapter or ("none" if opened.adapter is None else opened.adapter.name)
    about = {
        "model": path,
        "adapter": chosen,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(opened.device),
    }
    return opened.model, opened.tokenizer, about
