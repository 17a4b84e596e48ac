"""Quantize a Llama-2-7B-shaped checkpoint of random weights: wall clock, compute, host memory.

    python benchmarks/quantize/seven_b.py FOLDER [--device cuda] [--formats nf4 nf2] [--fits mse]
        [--layers 32]

FOLDER/source is made first if missing (13.5 GB in bf16, left in the page cache). Each row is a
process of its own: `process` is all of it, from the interpreter's start to its exit; `wall` is
`loftq.quantize` from call to return with reading and writing; `compute` its solves; `anonymous` the
largest RssAnon during the call, less that before it. For what fills the compute see
profile_solve.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import loftq

HIDDEN, INTERMEDIATE, VOCAB = 4096, 11008, 32000


def make_source(folder: Path, layers: int, device: str) -> None:
    """A folder with the tensors and config of Llama-2-7B, random bf16 weights, a shard a layer."""
    folder.mkdir(parents=True)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    weight_map: dict[str, str] = {}

    def put(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file({k: v.cpu() for k, v in tensors.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def draw(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, device=device)).bfloat16()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{name}.weight": draw(*shape) for name, shape in shapes.items()}
        tensors[f"{prefix}input_layernorm.weight"] = ones.clone()
        tensors[f"{prefix}post_attention_layernorm.weight"] = ones.clone()
        put(f"model-{i:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "lm_head.weight": draw(VOCAB, HIDDEN)}
    put("model-ends.safetensors", {**ends, "model.norm.weight": ones})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class PeakMemory:
    """Largest RssAnon while the context is open, sampled every 20 ms, above that at its start."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = anonymous_bytes()
        self._open = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.02)


def measure(source: Path, output: Path, options: argparse.Namespace) -> dict[str, float]:
    """Quantize once in this process; seconds, GB and the mean error."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        result = loftq.quantize(
            source,
            output,
            format=options.formats[0],
            scale_fit=options.fits[0],
            rank=options.rank,
            device=options.device,
        )
    wall = time.perf_counter() - start
    cuda = options.device.startswith("cuda")
    return {
        "wall": wall,
        "compute": result.timings["solve"],
        "anonymous": (memory.peak - memory.start) / 1e9,
        "gpu": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "error": sum(r["error"] for r in result.records) / len(result.records),
    }


def in_new_process(args: argparse.Namespace, name: str, fit: str) -> dict[str, float]:
    """One row, measured in a process of its own, and that process' seconds."""
    command = [sys.executable, __file__, str(args.folder), "--device", args.device]
    command += ["--formats", name, "--fits", fit, "--rank", str(args.rank), "--one"]
    start = time.perf_counter()
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"process": time.perf_counter() - start, **json.loads(answer.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", nargs="+", default=("nf4", "nf2"))
    parser.add_argument("--fits", nargs="+", default=("mse", "absmax"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--one", action="store_true", help="measure the first row here, as JSON")
    args = parser.parse_args()
    source, output = args.folder / "source", args.folder / "out"
    if args.one:
        print(json.dumps(measure(source, output, args)))
        return
    if not source.exists():
        make_source(source, args.layers, args.device)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    columns = ("process", "wall", "compute", "anonymous", "gpu", "error")
    titles = ("process, s", "wall, s", "compute, s", "anonymous, GB", "GPU peak, GB", "mean error")
    print(f"| format | fit | {' | '.join(titles)} |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name in args.formats:
        for fit in args.fits:
            shutil.rmtree(output, ignore_errors=True)
            row = in_new_process(args, name, fit)
            numbers = " | ".join(f"{row[key]:.{4 if key == 'error' else 2}f}" for key in columns)
            print(f"| {name} | {fit} | {numbers} |", flush=True)
    shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
