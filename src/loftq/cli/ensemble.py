"""`loftq lab ensemble`: several adapters on one packed backbone, their probabilities averaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from rich.console import Console

    from loftq.lab.ensemble import AverageResult, EnsembleResult, Follower
    from loftq.tasks import TaskResult
    from loftq.train.listener import Listener


def ensemble(
    base: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output of `quantize` that all members share.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder; the same command goes on with it.")
    ],
    task: Annotated[
        str,
        typer.Option(help="rte, dream, squad, gsm8k-loss, wikitext2, ...; all but stsb."),
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
        chosen = options.collect({"members": None, "task": None}, settings, None, known).options
        follower = _follower(console.side_screen())
        found = train_ensemble(
            base, task, output, members=members, device=device, follower=follower, **dict(chosen)
        )
    if as_json:
        console.emit(found.to_dict())
        return
    out = console.screen()
    picture = _print(out, found, output)
    out.print(f"scores: {output / 'ensemble.json'}{picture}")
    out.print(f"next: loftq eval {task} {output}")


def _follower(screen: Console) -> Follower:
    """Lines on `screen` for every member, a bar of steps between them."""
    from loftq.lab.ensemble import Follower

    steps = _steps(screen)

    def begun(seed: int, place: int, total: int) -> None:
        screen.print(f"[{place} of {total}] members/{seed}", markup=False, highlight=False)

    def ended(result: TaskResult) -> None:
        spent = console.duration(float(result.summary["seconds"]))
        how = "trained earlier in" if result.already_finished else "trained in"
        screen.print(f"    {result.primary} {result.value:.4f}, {how} {spent}", highlight=False)

    return Follower(begun, ended, steps)


def _steps(screen: Console) -> Listener:
    """A bar of the steps of a member; nothing away from a terminal."""
    from loftq.cli.progress import Bar
    from loftq.train.listener import Briefing, Listener, Pace

    class Steps(Listener):
        bar: Bar | None = None

        def ready(self, briefing: Briefing) -> None:
            self.bar = Bar(screen, "steps")

        def step(self, row: Mapping[str, Any], pace: Pace) -> None:
            assert self.bar is not None
            left = (
                "" if pace.seconds_left is None else f"{console.duration(pace.seconds_left)} left"
            )
            self.bar.update(pace.step, pace.total, f"loss {row['loss']:.4f}, {left}")

        def finished(self, samples: object) -> None:
            assert self.bar is not None
            self.bar.close()

    return Steps()


def _print(out: Console, found: EnsembleResult | AverageResult, output: Path) -> str:
    """The table; names the picture, if there is one."""
    from loftq.lab.ensemble import AverageResult

    if isinstance(found, AverageResult):
        _print_metrics(out, found)
        return ""
    _print_quality(out, found)
    return f", picture: {output / 'reliability.svg'}"


def _print_metrics(out: Console, found: AverageResult) -> None:
    """Members and ensemble by the task's own metrics: a table for each split."""
    lines = [(f"member {place}", metrics) for place, metrics in enumerate(found.members)]
    for split, scores in found.ensemble.items():
        names = (found.primary, *(name for name in scores if name != found.primary))
        right = (*names, "95 % of the first", "rows")
        shown = console.table(f"{found.task}, {split}", *right, right=right)
        for line, metrics in [*lines, ("ensemble", found.ensemble)]:
            each = [metrics[split][name] for name in names]
            span = f"{each[0]['low']:.4f} to {each[0]['high']:.4f}"
            values = [f"{score['value']:.4f}" for score in each]
            shown.add_row(line, *values, span, f"{each[0]['rows']:,}")
        out.print(shown)


def _print_quality(out: Console, found: EnsembleResult) -> None:
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
        f"{found.disagreement:.1%} of them; mean KL(member || ensemble) {found.divergence:.2g}."
    )
    for other in found.outside:
        out.print(
            f"{other.rows} rows of {other.task} told from these (AUROC; 0.5 is a coin): entropy "
            f"{other.entropy:.3f}, confidence {other.confidence:.3f}, divergence of the members "
            f"{other.divergence:.3f}; a single member's entropy {other.member_entropy:.3f}."
        )
