"""Tokens a second of one answer, weights packed and unpacked once: what `weights=` of chat costs.

    python benchmarks/chat/speed.py PATH [--device cpu] [--tokens 64] [--repeats 3] [--dtype auto]

PATH is what `loftq chat` takes. One greedy answer of exactly --tokens tokens, no stop token, after
a warm-up of 4; the median of the repeats. CPU seconds are those of this process for each token and
say more than tokens a second on a machine that others use too. Refuses to time two ways of holding
the weights that do not say the same text.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from loftq.chat import Session, open_session
from loftq.integrations import generate
from loftq.integrations.generate import Answer, Sampling, answer

PROMPT = "What makes a river carry water and mud to the sea? Answer in a few sentences."


def ask(session: Session, tokens: int) -> Answer:
    ids = session.conversation.prompt(PROMPT, room=tokens).ids
    opened = session.opened
    return answer(opened.model, opened.tokenizer, ids, Sampling(max_new_tokens=tokens))


def row(path: str, weights: str, args: argparse.Namespace) -> tuple[str, str]:
    """(a table row, the text that was said)."""
    session = open_session(path, device=args.device, dtype=args.dtype, weights=weights)
    ask(session, 4)
    found, cpu = [], []
    for _ in range(args.repeats):
        begun = time.process_time()
        found.append(ask(session, args.tokens))
        cpu.append((time.process_time() - begun) / args.tokens)
    speeds = [x.tokens_per_second for x in found if x.tokens_per_second is not None]
    held = session.weights
    assert held is not None
    size = held.dense_bytes if held.dense else held.packed_bytes
    first = statistics.median(x.first_seconds for x in found)
    line = (
        f"| {weights} | {size / 1e6:.0f} | {statistics.median(speeds):.2f} | {first:.2f} | "
        f"{statistics.median(cpu):.3f} |"
    )
    return line, found[0].text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    generate.stop_tokens = lambda model, tokenizer: []  # every answer has the same length
    rows = [row(args.path, weights, args) for weights in ("packed", "dense")]
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}")
    print("| weights | MB | tokens a second | first token, s | CPU s a token |")
    print("|---|--:|--:|--:|--:|")
    for line, _ in rows:
        print(line)
    if rows[0][1] != rows[1][1]:
        raise SystemExit("packed and dense weights said different texts: the rows do not compare")


if __name__ == "__main__":
    main()
