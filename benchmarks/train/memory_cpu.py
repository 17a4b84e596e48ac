"""Predicted against measured peak of training on a CPU: anonymous memory above the libraries.

    LOFTQ_MODELS=FOLDER python benchmarks/train/memory_cpu.py --output results.md

SmolLM2-135M, quantized here. Each cell is a process of its own: it warms up on a tiny model, so
that lazily imported libraries are not counted, loads the packed model, makes its tensors anonymous
(they are mapped from the files otherwise), and trains three steps while a thread reads RssAnon.

glibc keeps freed blocks below a threshold that it raises by itself, so that its heap shows memory
that no tensor has. The threshold is fixed here (MALLOC_MMAP_THRESHOLD_): freed is given back. That
takes 1.7 times as long a step, so training itself leaves it alone; the column "as it is" has the
peak of the same cell without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

CELLS = [(bits, rank, length) for bits in (4, 3, 2) for rank in (8, 32) for length in (256, 512)]
THRESHOLD = str(1 << 16)


def main() -> None:
    """All cells, or one of them in this process."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path)
    options.add_argument("--cell", nargs=2, help="OUT LENGTH: one cell, JSON on stdout")
    given = options.parse_args()
    if given.cell:
        print(json.dumps(_cell(Path(given.cell[0]), int(given.cell[1]))))
        return
    lines = [
        f"# Training memory on a CPU, SmolLM2-135M, float32, {date.today()}",
        "",
        "| bits | rank | tokens | predicted MB | measured MB | ratio | as it is, MB |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for bits, rank, length in CELLS:
            found = _run(Path(folder) / f"{bits}-{rank}", bits, rank, length)
            lines.append(
                f"| {bits} | {rank} | {length} | {found['predicted'] / 1e6:.0f} | "
                f"{found['measured'] / 1e6:.0f} | {found['predicted'] / found['measured']:.3f} | "
                f"{found['as it is'] / 1e6:.0f} |"
            )
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


def _run(out: Path, bits: int, rank: int, length: int) -> dict[str, int]:
    if not out.exists():
        import loftq

        source = Path(os.environ["LOFTQ_MODELS"]) / "smollm2-135m"
        loftq.quantize(source, out, bits=bits, rank=rank, method="qlora", device="cpu")
    command = [sys.executable, "-W", "ignore", __file__, "--cell", str(out), str(length)]
    found = {}
    for name, extra in (("as it is", {}), ("measured", {"MALLOC_MMAP_THRESHOLD_": THRESHOLD})):
        environment = os.environ | extra
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        answer = json.loads(done.stdout.splitlines()[-1])
        found |= {name: answer["measured"], "predicted": answer["predicted"]}
    return found


def _cell(out: Path, length: int) -> dict[str, int]:
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from shapes import random_model, subject, with_adapter
    from step import train_steps

    import loftq
    from loftq.train.memory.predict import TrainingSettings, predict
    from loftq.train.memory.subject import subject_of_output

    settings = TrainingSettings(length=length, dtype="fp32", device="cpu")
    predicted = predict(subject_of_output(out), settings).total
    warm = subject("tiny", rank=4)
    tiny = with_adapter(random_model("tiny", warm, device="cpu", dtype=torch.float32), warm, 4)
    train_steps(tiny, TrainingSettings(length=16, dtype="fp32", device="cpu"), 2, device="cpu")
    del tiny
    gc.collect()
    base = _anonymous()
    model: Any = loftq.load(out, trainable=True, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], _anonymous() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    time.sleep(0.01)
    train_steps(model, settings, 3, device="cpu")
    stop.set()
    thread.join()
    return {"predicted": predicted, "measured": peak[0]}


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
