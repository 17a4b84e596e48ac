"""What each part of `fast` is worth: output error of some layers, part by part.

    python benchmarks/quality/fast_ablation.py MODEL_FOLDER --calibrate c4_sample.jsonl.gz
        [--layers model.layers.18.self_attn.q_proj model.layers.18.mlp.gate_proj]
        [--format int2-g64-dq] [--rank 64] [--windows 48] [--device cpu]

Errors are relative to ||W R||, R R^T the Gram of the calibration tokens, over all layers together.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from loftq.checkpoint import open_checkpoint
from loftq.formats import default_fit, parse_format
from loftq.integrations import calibrate, discover
from loftq.integrations.blocks import CheckpointBlocks
from loftq.methods import METHODS, LayerProblem
from loftq.pipeline.calibration import read_statistics
from loftq.pipeline.config import QuantizeConfig
from loftq.pipeline.plan import make_plan

FAST, CLOQ = METHODS["fast"], METHODS["cloq"].with_options(metric_damping=1e-4)
STEPS = {
    "nearest, one correction (qera-exact)": METHODS["qera-exact"],
    "GPTQ, one correction (cloq)": CLOQ,
    "GPTQ and descent, one correction": CLOQ.with_options(rounding="gptq-descent"),
    "GPTQ, alternate T=4": CLOQ.with_options(iterations=4),
    "GPTQ and descent, alternate T=4": CLOQ.with_options(iterations=4, rounding="gptq-descent"),
    "GPTQ, projection T=3, d=.01": FAST.with_options(rounding="gptq", damping=0.01, iterations=3),
    "GPTQ and descent, projection T=3, d=.01": FAST.with_options(damping=0.01, iterations=3),
    "GPTQ and descent, projection T=3, d=.03": FAST.with_options(iterations=3),
    "GPTQ and descent, projection T=5, d=.03 (fast)": FAST,
    "GPTQ and descent, projection T=5, d=.1": FAST.with_options(damping=0.1),
    "GPTQ and descent, projection T=8, d=.03": FAST.with_options(iterations=8),
}
LAYERS = ("model.layers.18.self_attn.q_proj", "model.layers.18.mlp.gate_proj")


def problems(args: argparse.Namespace) -> list[LayerProblem]:
    """One problem per layer, with its statistics."""
    source, device = open_checkpoint(args.model), torch.device(args.device)
    config = QuantizeConfig(
        method="fast",
        format=args.format,
        rank=args.rank,
        targets=tuple(args.layers),
        data=args.calibrate,
        calibration_windows=args.windows,
        statistics=args.statistics,
    )
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    layout = discover.describe_folder(args.model, shapes, targets=list(config.targets))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = calibrate.read_windows(config, layout, tokenizer, discover.load_config(args.model))
    known = calibrate.planned(config, windows, source.fingerprint(), args.device)
    plan = make_plan(config, layout, source, device=args.device, calibration=known)
    store = calibrate.take_statistics(
        plan, windows, lambda: CheckpointBlocks(args.model, source, device)
    )
    spec = parse_format(args.format)
    return [
        LayerProblem(
            names=(layer.info.module,),
            weights=source.read(layer.info.tensor)[None].float().to(device),
            spec=spec,
            rank=args.rank,
            scaling=1.0,
            scale_fit=default_fit(spec),
            seeds=(layer.seed,),
            statistics=read_statistics(store, [layer.info.module], "gram", device),
        )
        for layer in plan.layers
    ]


def whole_output(problem: LayerProblem) -> float:
    """tr(W H W^T)."""
    W, H = problem.weights[0].double(), problem.statistics.gram[0].double()
    return ((W @ H) * W).sum().item()


def arguments(doc: str) -> argparse.ArgumentParser:
    """What every script that solves some layers of a model is told; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--format", default="int2-g64-dq")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--statistics")
    parser.add_argument("--device", default="cpu")
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    cases = problems(args)
    print("| parts | output error | seconds |")
    print("|---|--:|--:|")
    for name, method in STEPS.items():
        begin, total = time.perf_counter(), 0.0
        for case in cases:
            record = method.solve(case).records[0]
            total += record.output_error**2 * whole_output(case)
        error = math.sqrt(total / sum(map(whole_output, cases)))
        print(f"| {name} | {error:.4f} | {time.perf_counter() - begin:.1f} |", flush=True)


if __name__ == "__main__":
    main()
