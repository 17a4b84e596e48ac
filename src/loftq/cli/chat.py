"""`loftq chat`: talk to a run or an output, on a terminal or one question at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import console, options

if TYPE_CHECKING:
    from loftq.chat import Reply, Session

COMMANDS = "/reset forgets the conversation, /quit leaves; Ctrl-C stops an answer"


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("expected a number") from None


KEYS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": _whole,
    "temperature": _number,
    "top_p": _number,
    "repetition_penalty": _number,
    "system": str,
    "adapter": str,
    "weights": str,
    "dtype": options.dtype_name,
}


def chat(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="RUN of `loftq train`, or OUT of `quantize`.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="system=TEXT max_new_tokens=512 temperature=0 adapter=FOLDER weights=packed ...",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end; a piped stdin does the same.")
    ] = None,
    device: options.Device = None,
    seed: options.Seed = None,
    as_json: options.AsJson = False,
) -> None:
    """Talk to a model. With --prompt or a piped stdin: one answer on stdout, and nothing else."""
    chosen = options.parse_pairs(settings or (), KEYS)
    question = _question(prompt, as_json=as_json)
    with console.answering(as_json=as_json or question is not None):
        session = _open(path, chosen, device, seed)
    if question is None:
        _talk(session)
    else:
        _answer_once(session, question, as_json=as_json)


def _question(prompt: str | None, *, as_json: bool) -> str | None:
    """The one prompt to answer, or None for a conversation on the terminal."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty.")
    if prompt is None and as_json:
        raise typer.BadParameter("--json answers one prompt: give --prompt, or pipe a text in.")
    return prompt


def _open(path: str, chosen: dict[str, Any], device: str | None, seed: int | None) -> Session:
    from transformers.utils import logging

    from loftq.chat import open_session
    from loftq.integrations.generate import Sampling

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    known = {field.name for field in fields(Sampling)}
    sampling = {key: value for key, value in chosen.items() if key in known}
    others = {key: value for key, value in chosen.items() if key not in known}
    return open_session(
        path, device=device, sampling=Sampling(seed=seed or 0, **sampling), **others
    )


def _answer_once(session: Session, question: str, *, as_json: bool) -> None:
    """The answer on stdout; remarks on stderr."""
    if as_json:
        console.emit(_as_dict(session, question, session.reply(question)))
        return
    reply = session.reply(question, on_text=_write)
    print()
    for remark in remarks(session, reply)[1:]:
        print(f"warning: {remark}", file=sys.stderr)


def _talk(session: Session) -> None:
    out = console.screen()
    out.print(_head(session))
    out.print(COMMANDS, style="dim")
    while (line := _read()) is not None:
        if line == "/reset":
            session.reset()
            out.print("forgotten; the conversation begins anew", style="dim")
        elif line in ("/quit", "/exit"):
            return
        elif line.startswith("/"):
            out.print(f"no such command; {COMMANDS}. Begin with a space to say it.", style="dim")
        elif line.strip():
            _take_turn(session, line)


def _take_turn(session: Session, line: str) -> None:
    out = console.screen()
    try:
        reply = session.reply(line.strip(), on_text=_write, interruptible=True)
    except ValueError as error:  # too long, or refused by the template: the next may be answered
        out.print(f"error: {error}", style="red")
        return
    print()
    out.print("; ".join(remarks(session, reply)), style="dim")


def _read() -> str | None:
    """A line of the user; None at the end. Ctrl-C drops the line, as shells do."""
    with contextlib.suppress(ImportError):  # a Python without it: input() works, only plainer
        import readline  # noqa: F401  line editing and history for input()

    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("  (/quit or Ctrl-D leaves)")


def _write(piece: str) -> None:
    """Print a piece of an answer at once; a terminal gets no control characters from a model."""
    if sys.stdout.isatty():
        piece = "".join(c for c in piece if c.isprintable() or c in "\n\t")
    print(piece, end="", flush=True)


def remarks(session: Session, reply: Reply) -> list[str]:
    """The speed, then whatever the reader would not expect of the answer."""
    answer, speed = reply.answer, reply.answer.tokens_per_second
    found = [console.count(answer.tokens, "token") + (f", {speed:.1f} a second" if speed else "")]
    if reply.context_full:
        found.append(f"cut: the model's context of {session.opened.context:,} tokens is full")
    elif answer.ended == "length":
        found.append(f"cut at max_new_tokens={session.sampling.max_new_tokens}")
    elif answer.ended == "interrupted":
        found.append("stopped by you")
    if reply.forgotten:
        turns = console.count(reply.forgotten, "turn")
        found.append(f"the oldest {turns} did not fit into the context and were forgotten")
    return found


def _head(session: Session) -> Any:
    """What answers, and how."""
    opened, weights = session.opened, session.weights
    lines = console.facts()
    adapter = "none" if opened.adapter is None else str(opened.adapter)
    dtype = str(opened.dtype).removeprefix("torch.")
    lines.add_row("model", str(opened.folder), f"{dtype} on {opened.device}")
    lines.add_row("adapter", adapter, "")
    if weights is not None:
        held = weights.dense_bytes if weights.dense else weights.packed_bytes
        state = "dense" if weights.dense else "packed"
        lines.add_row("weights", f"{state}, {console.size(held)}", weights.reason)
    lines.add_row("answers", *_manner(session))
    if not session.conversation.has_template:
        why = "the tokenizer has no chat template, as is usual for a base model"
        lines.add_row("form", "your text is continued as it is, each time anew", why)
    return lines


def _manner(session: Session) -> tuple[str, str]:
    sampling = session.sampling
    if sampling.temperature == 0:
        return "the likeliest token each time", "the same every time; temperature=0.7 draws"
    return f"drawn at temperature {sampling.temperature:g}", f"repeatable: seed {sampling.seed}"


def _as_dict(session: Session, question: str, reply: Reply) -> dict[str, Any]:
    opened, answer = session.opened, reply.answer
    return {
        "prompt": question,
        "answer": answer.text,
        "ended": "context" if reply.context_full else answer.ended,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "tokens_per_second": answer.tokens_per_second,
        "seconds": answer.seconds,
        "model": str(opened.folder),
        "adapter": "none" if opened.adapter is None else str(opened.adapter),
        "chat_template": session.conversation.has_template,
        "weights": "dense" if session.weights is None or session.weights.dense else "packed",
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(opened.device),
    }
