"""Five members on one 2-bit backbone against one: memory, time, and what averaging gains.

    python benchmarks/compare/ensemble.py --work DIR [--decoder MODEL] [--encoder MODEL]
        [--tasks mrpc dream] [--ranks 16 8] [--members 5] [--processes 1] [--seconds 190]
        [--data FOLDER] [--device cuda] [--dtype bfloat16] [--keys KEY=VALUE ...]

Decoding is at batch 1 from a static cache, one CUDA graph a token; one member has its adapter
folded into the packed product (`prepare_for_inference`), the ensemble runs five sequences whose
next-token probabilities are averaged. Reading is one forward over a prompt, bound by arithmetic.
Weights do not decide the speed, so that the decoder's members are the start in other factors.

Weights are the bytes of the model's tensors, each counted once; one member has its adapter as PEFT
loads it, in float32, and in a row of its own in the 16 bits that members are held in. The cache of
1024 tokens is what the device allocates with its graph, apart from the libraries' workspaces.

The members of a task are trained by PROCESSES processes side by side and scored in one pass;
KEY=VALUE are options of `train --task` for them. When SECONDS are over, members that are trained
are scored and the others are left as they are: the same command goes on with them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import loftq
from loftq.cli.options import collect
from loftq.integrations.causal import open_causal
from loftq.integrations.decode import GraphDecoder
from loftq.integrations.gauge import rotated_start
from loftq.integrations.inference import prepare_for_inference
from loftq.integrations.metrics import read_metrics
from loftq.lab.ensemble import score_ensemble, train_members
from loftq.lab.ensemble.picture import draw_reliability
from loftq.lab.locks import Locks
from loftq.nn.members import for_members
from loftq.tasks import find_task
from loftq.tasks.config import option_types
from loftq.tasks.kinds.batches import in_batches, on_device, scoring
from loftq.tasks.lengths import reading_length
from loftq.tasks.opening import Opened, open_for_task, open_members
from loftq.tasks.sources import read_split, some

BEGUN = time.monotonic()
SCORING = 25  # seconds kept for it, and for the passes that are timed


def decoding(
    model: Path, folder: Path, rank: int, members: int, device: str, dtype: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds a token and of a prompt, bytes: one member, and all in one model."""
    out = packed(model, folder, rank, device)
    names = [f"starts/{seed}" for seed in range(members)]
    for seed, name in enumerate(names):
        if not (folder / name / "base.json").is_file():
            rotated_start(out, folder / name, seed=seed)
    (folder / "ensemble.json").write_text(json.dumps({"members": names}))
    one = folder / names[0]
    for count, path, narrow in ((1, one, False), (1, one, True), (members, folder, False)):
        found = _decoded(path, device, dtype, tokens, narrow=narrow)
        yield {"part": "decode", "rank": rank, "members": count, **found}


def packed(model: Path, folder: Path, rank: int, device: str) -> Path:
    """The model at 2 bits, made by whichever process comes first."""
    out = folder / "out"
    with Locks(folder).waiting("packed"):
        if not (out / "loftq.json").is_file():
            loftq.quantize(model, out, bits=2, rank=rank, device=device)
    return out


def _decoded(path: Path, device: str, dtype: str, tokens: int, *, narrow: bool) -> dict[str, Any]:
    with fresh(device):
        opened = open_causal(path, device=device, dtype=dtype)
        if narrow:
            for name, tensor in named_tensors(opened.model):
                if is_factor(name):
                    tensor.data = tensor.data.to(torch.bfloat16)
        prepare_for_inference(opened.model)
        vocabulary = opened.model.get_input_embeddings().num_embeddings
        prompt = (torch.arange(512, device=device) % vocabulary)[None]
        repeats = min(10, tokens)
        with torch.no_grad():
            read = timed(lambda: opened.model(input_ids=prompt, logits_to_keep=1), repeats, device)
        before = allocated(device)
        decoder = GraphDecoder(opened.model, max_length=1024)
        logits = decoder.prefill(prompt)
        step = timed(lambda: decoder.step(logits.argmax(-1)), tokens, device)
        more = allocated(device) - before
        dtypes = {t.dtype for name, t in named_tensors(opened.model) if is_factor(name)}
        return {
            "adapter": ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
            "ms_token": step, "ms_prompt_512": read, "mb": held(opened.model) / 1e6,
            "mb_cache": more / 1e6, "fused": decoder.not_fused or "yes",
        }  # fmt: skip


def on_task(
    model: Path, task: str, folder: Path, members: int, processes: int, device: str, data: Path,
    until: float, options: dict[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Scores of the members that there was time to train, time and memory of a pass."""
    train(model, task, folder, members, processes, device, data, until - SCORING, options)
    every = [folder / task / f"members/{seed}" for seed in range(members)]
    runs = [run for run in every if (run / "task.json").is_file()]
    if len(runs) < members:
        yield {"part": task, "trained": len(runs), "steps": [reached(run) for run in every]}
    if len(runs) < 2:
        yield {"part": task, "members": len(runs), "missing": "no time for two members"}
        return
    outside, rows = ["rte"] if task == "mrpc" else [], options.get("eval_rows")
    found = score_ensemble(runs, task, data=data, device=device, eval_rows=rows, outside=outside)
    draw_reliability(found, folder / f"{task}.png")
    (folder / f"{task}.json").write_text(json.dumps(found.to_dict(), indent=1))
    means = {
        name: statistics.fmean(getattr(member, name) for member in found.members)
        for name in ("accuracy", "nll", "brier", "ece")
    }
    whole = {name: getattr(found.ensemble, name) for name in means}
    scored = {"part": task, "rank": 16, "rows": found.rows}
    yield {**scored, "members": "mean of one", **means}
    yield {**scored, "members": len(runs), **whole, "ece_interval": found.ensemble.ece_interval,
           "disagreement": found.disagreement, "divergence": found.divergence}  # fmt: skip
    one, all_of_them = _passes(runs, task, data, device)
    for count, cost in ((1, one), (len(runs), all_of_them)):
        yield {"part": f"{task} pass", "rank": 16, "members": count, **cost}


def train(
    model: Path, task: str, folder: Path, members: int, processes: int, device: str, data: Path,
    until: float, options: dict[str, Any],
) -> None:  # fmt: skip
    """The members in processes that share them; stopped when there is no time."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    begun = []
    for place in range(processes):
        log = folder / task / f"{place}.log"
        given = (model, task, folder, members, device, data, options, log)
        begun.append((spawn.Process(target=_train, args=given), log))
    for process, _ in begun:
        process.start()
    for process, log in begun:
        process.join(max(0.0, until - (time.monotonic() - BEGUN)))
        if process.is_alive():
            process.kill()
            process.join()
        elif process.exitcode:
            print(log.read_text()[-2000:], flush=True)


def _train(
    model: Path, task: str, folder: Path, members: int, device: str, data: Path,
    options: dict[str, Any], log: Path,
) -> None:  # fmt: skip
    """What one of the processes does; all that it prints goes into `log`."""
    with log.open("w") as lines:
        for stream in (1, 2):
            os.dup2(lines.fileno(), stream)
    out = packed(model, folder, 16, device)
    train_members(out, task, folder / task, members=members, data=data, device=device, **options)


def reached(run: Path) -> int:
    """The last step that a run has told of; what it was killed while writing does not count."""
    path = run / "metrics.jsonl"
    rows = read_metrics(path).train if path.is_file() else []
    return int(rows[-1]["step"]) if rows else 0


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
            found.append({"ms_row": spent / len(rows), "mb": held(opened.model) / 1e6})
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


def named_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    return [*model.named_parameters(), *model.named_buffers()]


def is_factor(name: str) -> bool:
    """Whether a tensor is A or B of an adapter."""
    return "lora_" in name or "stacked_" in name


def held(model: torch.nn.Module) -> int:
    """Bytes of the model's tensors; what is shared counts once."""
    storages = [t.untyped_storage() for _, t in named_tensors(model)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def allocated(device: str) -> int:
    """Bytes on the device without the workspaces of cuBLAS, which a graph has of its own too."""
    if device != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


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
    parser.add_argument("--tasks", nargs="*", default=["mrpc", "dream"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[16, 8], help="of the decoder")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="that train side by side")
    parser.add_argument("--tokens", type=int, default=100, help="steps that are timed")
    parser.add_argument("--seconds", type=float, default=190)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the decoder")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[str, Callable[[float], Iterator[dict[str, Any]]]]] = []
    for rank in given.ranks if given.decoder else ():
        where = given.work / f"decoder-{rank}"
        parts.append((f"decode r={rank}", lambda until, rank=rank, where=where: decoding(
            given.decoder, where, rank, given.members, given.device, given.dtype,
            given.tokens)))  # fmt: skip
    options = dict(collect({}, given.keys, None, option_types()).options)
    for task in given.tasks if given.encoder else ():
        parts.append((task, lambda until, task=task: on_task(
            given.encoder, task, given.work / "encoder", given.members, given.processes,
            given.device, given.data, until, options)))  # fmt: skip
    rows: list[dict[str, Any]] = []
    for place, (name, part) in enumerate(parts):
        now = time.monotonic() - BEGUN
        until = now + (given.seconds - now) / (len(parts) - place)
        try:
            rows.extend(part(until))
        except Exception as error:  # the other parts are still worth having
            rows.append({"part": name, "missing": f"{type(error).__name__}: {error}"})
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (given.work / "rows.jsonl").write_text(text, encoding="utf-8")
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {time.monotonic() - BEGUN:.0f} s")
    for row in rows:
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        print("  ".join(shown))


if __name__ == "__main__":
    main()
