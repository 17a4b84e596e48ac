"""Five members on one 2-bit backbone against one: memory, time, and what averaging gains.

    python benchmarks/compare/ensemble.py --decoder MODEL --encoder MODEL --data FOLDER --work DIR
        [--tasks rte dream] [--members 5] [--seconds 190] [--device cuda] [--keys KEY=VALUE ...]

Decoding is at batch 1 from a static cache, one CUDA graph a token; one member has its adapter
folded into the packed product (`prepare_for_inference`), the ensemble runs five sequences whose
next-token probabilities are averaged. Reading is one forward over a prompt, bound by arithmetic.
Weights do not decide the speed, so that the decoder's members are the start in other factors.
Memory is what the model takes on the device, and apart from it the cache of 1024 tokens with its
graph; on a CPU, the model's own tensors. The
members of a task are trained one after the other and scored in one pass; KEY=VALUE are options of
`train --task` for them. What there is no time for is left out and said.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import loftq
from loftq.integrations.causal import open_causal
from loftq.integrations.decode import GraphDecoder
from loftq.integrations.gauge import rotated_start
from loftq.integrations.inference import prepare_for_inference
from loftq.lab.ensemble import score_ensemble
from loftq.lab.ensemble.picture import draw_reliability
from loftq.nn.members import for_members
from loftq.tasks import find_task, train_task
from loftq.tasks.kinds.batches import in_batches, on_device, scoring
from loftq.tasks.lengths import reading_length
from loftq.tasks.opening import Opened, open_for_task, open_members
from loftq.tasks.sources import read_split, some

BEGUN = time.monotonic()


def decoding(model: Path, folder: Path, members: int, device: str, tokens: int) -> list[dict]:
    """Milliseconds a token and of a prompt, bytes: one member, and all in one model."""
    out = packed(model, folder, device)
    for seed in range(members):
        if not (folder / f"starts/{seed}/base.json").is_file():
            rotated_start(out, folder / f"starts/{seed}", seed=seed)
    names = [f"starts/{seed}" for seed in range(members)]
    (folder / "ensemble.json").write_text(json.dumps({"members": names}))
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [
        {"part": "decode", "members": count, **_decoded(path, device, dtype, tokens)}
        for count, path in ((1, folder / "starts/0"), (members, folder))
    ]


def packed(model: Path, folder: Path, device: str) -> Path:
    """The model at 2 bits, rank 16."""
    out = folder / "out"
    if not (out / "loftq.json").is_file():
        loftq.quantize(model, out, bits=2, rank=16, device=device)
    return out


def _decoded(path: Path, device: str, dtype: str, tokens: int) -> dict[str, float]:
    with fresh(device):
        opened = open_causal(path, device=device, dtype=dtype)
        prepare_for_inference(opened.model)
        held = allocated(opened.model, device)
        decoder = GraphDecoder(opened.model, max_length=1024)
        vocabulary = opened.model.get_input_embeddings().num_embeddings
        prompt = (torch.arange(512, device=device) % vocabulary)[None]
        logits = decoder.prefill(prompt)
        step = timed(lambda: decoder.step(logits.argmax(-1)), tokens, device)
        more = allocated(opened.model, device) - held
        with torch.no_grad():
            read = timed(lambda: opened.model(input_ids=prompt, logits_to_keep=1), 10, device)
        return {"ms_token": step, "ms_prompt_512": read, "mb": held / 1e6, "mb_cache": more / 1e6}


def on_task(
    model: Path, task: str, folder: Path, members: int, device: str, data: Path, until: float,
    options: dict[str, Any],
) -> list[dict]:  # fmt: skip
    """Members trained as long as there is time, their scores, time and memory of a pass."""
    out, runs, spent = packed(model, folder, device), [], []
    for seed in range(members):
        # A member takes as long as the one before; scoring them all about as long as one.
        if spent and time.monotonic() - BEGUN + 2 * max(spent) > until:
            print(f"{task}: no time for members {seed} to {members - 1}", flush=True)
            break
        begun = time.monotonic()
        start, run = folder / f"starts/{seed}", folder / f"{task}/{seed}"
        if not (start / "base.json").is_file():
            rotated_start(out, start, seed=seed)
        train_task(start, task, run, data=data, device=device, seed=seed, **options)
        runs.append(run)
        spent.append(time.monotonic() - begun)
        print(f"{task}: member {seed} in {spent[-1]:.0f} s", flush=True)
    if len(runs) < 2:
        return [{"part": task, "members": len(runs), "missing": "no time for two members"}]
    outside = ["mrpc"] if task == "rte" else []
    found = score_ensemble(runs, task, data=data, device=device, outside=outside)
    draw_reliability(found, folder / f"{task}.png")
    (folder / f"{task}.json").write_text(json.dumps(found.to_dict(), indent=1))
    means = {
        name: statistics.fmean(getattr(member, name) for member in found.members)
        for name in ("accuracy", "nll", "brier", "ece")
    }
    whole = {name: getattr(found.ensemble, name) for name in means}
    one, all_of_them = _passes(runs, task, data, device)
    return [
        {"part": task, "members": 1, **means, **one},
        {"part": task, "members": len(runs), **whole, "ece_interval": found.ensemble.ece_interval,
         "disagreement": found.disagreement, "divergence": found.divergence, **all_of_them},
    ]  # fmt: skip


def _passes(runs: list[Path], task: str, data: Path, device: str) -> list[dict[str, float]]:
    """Milliseconds a row at batch 32, and bytes: the first run as it is, all in one model."""
    chosen, found = find_task(task), []
    rows = some(read_split(chosen, chosen.splits.test[0], data=data), 128)
    for count in (1, len(runs)):
        with fresh(device):
            opened = open_for_task(runs[0], chosen, "auto") if count == 1 else open_members(
                runs, chosen
            )  # fmt: skip
            opened.model.to(device).eval()
            spent = timed(lambda: _pass(opened, chosen, rows, count), 3, device)  # noqa: B023
            held = allocated(opened.model, device)
            found.append({"ms_row": spent / len(rows), "mb": held / 1e6})
    return found


def _pass(opened: Opened, task: Any, rows: list[Any], members: int) -> None:
    model, words = opened.model, opened.tokenizer
    length = reading_length(task, words, model.config, opened.settings.get("max_length"))

    def run(batch: Any) -> list[Any]:
        inputs = on_device(task.inputs(batch, words), model)
        return [*model(**for_members(inputs, members)).logits.unflatten(0, (members, -1))[0]]

    with scoring(model):
        in_batches(task.encode(rows, words, model.config, length), 32, run, lambda *_: None)


def timed(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def allocated(model: torch.nn.Module, device: str) -> int:
    """Bytes on the device, or of the model's tensors on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@contextlib.contextmanager
def fresh(device: str) -> Iterator[None]:
    """Nothing left on the device from before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    yield


def main() -> None:
    """Every part there is time for; rows as JSON lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decoder", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--data", type=Path, help="laid out as LOFTQ_DATA")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=["rte", "dream"])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="steps that are timed")
    parser.add_argument("--seconds", type=float, default=190)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    options = {key: json.loads(value) for key, value in (word.split("=") for word in given.keys)}
    given.work.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[str, Callable[[float], list[dict]]]] = []
    if given.decoder:
        where = given.work / "decoder"
        parts.append(("decode", lambda until: decoding(
            given.decoder, where, given.members, given.device, given.tokens)))  # fmt: skip
    for task in given.tasks if given.encoder else ():
        parts.append((task, lambda until, task=task: on_task(
            given.encoder, task, given.work / "encoder", given.members, given.device, given.data,
            until, options)))  # fmt: skip
    rows: list[dict] = []
    for place, (name, part) in enumerate(parts):
        now = time.monotonic() - BEGUN
        until = now + (given.seconds - now) / (len(parts) - place)
        try:
            rows += part(until)
        except Exception as error:  # the other parts are still worth having
            rows.append({"part": name, "missing": f"{type(error).__name__}: {error}"})
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (given.work / "rows.jsonl").write_text(text, encoding="utf-8")
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {time.monotonic() - BEGUN:.0f} s")
    for row in rows:
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        print("  ".join(shown))
    measured = {(row["part"], row["members"] > 1): row for row in rows if "missing" not in row}
    for name, _ in parts:
        one, many = measured.get((name, False)), measured.get((name, True))
        if one is not None and many is not None:
            keys = [
                k for k in ("mb", "mb_cache", "ms_token", "ms_prompt_512", "ms_row") if k in one
            ]
            ratios = ", ".join(f"{key} x{many[key] / one[key]:.2f}" for key in keys if one[key])
            print(f"{name}: {many['members']} members / one: {ratios}")


if __name__ == "__main__":
    main()
