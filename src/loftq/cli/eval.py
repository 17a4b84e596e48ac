"""`loftq eval`: scores of a packed model, or of the plain one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("auto", "float32", "float16", "bfloat16")

app = typer.Typer(help="Score a model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _eval() -> None:
    """Score a model."""


@app.command()
def ppl(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Output of `loftq quantize`, or a plain model.")
    ],
    data: Annotated[Path, typer.Option(help="Text: .txt, .raw (WikiText) or .jsonl, also .gz.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="batch=1 dtype=auto (float32, bfloat16, ...)."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first windows. Default: all.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder, or none. Default: OUT's start adapter.")
    ] = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Perplexity by the protocol of the quantization papers; its parameters stand beside it."""
    chosen = options.parse_pairs(settings or (), {"batch": _batch, "dtype": _dtype})
    with console.answering(as_json=as_json):
        from loftq.cli.progress import Bar
        from loftq.eval import encode, perplexity, read_text, split_of

        text = read_text(data)
        model, tokenizer, about = _load(path, adapter, device, chosen.get("dtype", "auto"))
        with Bar(console.side_screen(), "windows") as bar:
            result = perplexity(
                model,
                encode(tokenizer, text),
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
    out.print(f"perplexity {result.perplexity:.4f}  (nll {result.nll:.6f} nats a token)")
    out.print(
        f"  protocol {result.protocol}, context {context}, split {answer['split']} ({data.name}), "
        f"{console.count(result.windows, 'window')}, {result.tokens:,} predicted tokens"
    )
    out.print(f"  {path}, adapter {about['adapter']}, {about['dtype']} on {about['device']}")


def _batch(value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError("expected a whole number of at least 1")
    return int(value)


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    return value


def _load(
    path: str, adapter: str | None, device: str | None, dtype: str
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model with its adapter, its tokenizer, and what to say about them."""
    import sys

    import torch
    from transformers.utils import logging

    from loftq import api
    from loftq.integrations import discover
    from loftq.integrations.peft import load_adapter

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    folder = discover.resolve_source(path)
    chosen = adapter or ("init_adapter" if _is_packed(folder) else "none")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    api.check_device(name)
    where = torch.device(name)
    tokenizer = discover.load_tokenizer(folder)
    base = api.load_base(folder, dtype=dtype)
    _check_causal(folder, base)
    model: nn.Module = base
    if chosen != "none":
        model = load_adapter(base, folder / "init_adapter" if adapter is None else adapter)
    _check_bfloat16(base.dtype, where)
    about = {
        "model": path,
        "adapter": chosen,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(where),
    }
    return model.to(where), tokenizer, about


def _is_packed(folder: Path) -> bool:
    from loftq.integrations.source import quantization_method, read_config

    return quantization_method(read_config(folder)) == "loftq"


def _check_causal(folder: Path, model: nn.Module) -> None:
    from loftq.integrations.discover import task_type

    kind = type(model).__name__
    if task_type(kind) != "CAUSAL_LM":
        raise ValueError(
            f"{folder}: {kind} is not a causal language model, so it has no perplexity of this "
            "kind. Give a model for text generation."
        )


def _check_bfloat16(dtype: Any, device: Any) -> None:
    import torch

    if dtype != torch.bfloat16 or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, in which this model is stored. "
            "Add dtype=float16, or dtype=float32 for twice the memory."
        )
