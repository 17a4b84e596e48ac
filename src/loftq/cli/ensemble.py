"""`loftq lab ensemble`: several adapters on one packed backbone, their probabilities averaged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.lab.ensemble import EnsembleResult


def ensemble(
    base: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output of `quantize` that all members share.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder; the same command goes on with it.")
    ],
    task: Annotated[
        str, typer.Option(help="A classification or a choice: rte, sst2, mnli, anli, dream, ...")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Options of `train --task` for every member; outside=mrpc: foreign tasks.",
        ),
    ] = None,
    members: Annotated[int, typer.Option(help="How many.")] = 5,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune several adapters on one packed backbone; score their averaged probabilities."""
    with console.answering(as_json=as_json):
        from loftq.lab.ensemble import train_ensemble
        from loftq.tasks.config import option_types

        known = {**option_types(), "seed": int, "outside": tuple[str, ...]}
        chosen = options.collect({}, settings, None, known).options
        found = train_ensemble(base, task, output, members=members, device=device, **dict(chosen))
    if as_json:
        console.emit(found.to_dict())
        return
    out = console.screen()
    _print(out, found)
    out.print(f"scores: {output / 'ensemble.json'}, picture: {output / 'reliability.svg'}")
    out.print(f"next: loftq eval {task} {output}")


def _print(out: Console, found: EnsembleResult) -> None:
    right = ("accuracy", "NLL", "Brier", "ECE", "95 % of ECE")
    shown = console.table("", *right, right=right)
    lines = [(f"member {place}", member) for place, member in enumerate(found.members)]
    for name, scored in [*lines, ("ensemble", found.ensemble)]:
        low, high = scored.ece_interval
        figures = (scored.accuracy, scored.nll, scored.brier, scored.ece)
        shown.add_row(name, *(f"{x:.4f}" for x in figures), f"{low:.4f} to {high:.4f}")
    out.print(shown)
    out.print(
        f"{found.rows} rows of {found.task} ({found.split}). Two members differ on "
        f"{found.disagreement:.1%} of them; mean KL(member || ensemble) {found.divergence:.4f}."
    )
    for other in found.outside:
        out.print(
            f"{other.rows} rows of {other.task} told from these (AUROC; 0.5 is a coin): entropy "
            f"{other.entropy:.3f}, confidence {other.confidence:.3f}, divergence of the members "
            f"{other.divergence:.3f}; a single member's entropy {other.member_entropy:.3f}."
        )
