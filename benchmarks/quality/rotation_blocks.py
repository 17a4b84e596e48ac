"""What rotating the inputs of a layer is worth, by size of the blocks and method.

    python benchmarks/quality/rotation_blocks.py MODEL_FOLDER --calibrate c4_sample.jsonl.gz
        [--layers NAME ...] [--format int2-g64-dq] [--blocks 0 16 64 128 512] [--device cuda]

One row a method and block (0 = not rotated; a width that the block does not divide is left out):
for each layer the weight error ("rounded" by qlora alone, else with its adapter) and the output
error on the calibration tokens, as records hold them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from fast_ablation import arguments, problems

from loftq.methods import METHODS, LayerProblem

LAYERS = tuple(
    f"model.layers.18.{name}"
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
)


def cell(method: str, case: LayerProblem, block: int) -> str:
    """Weight and output error of one layer, or that the block does not fit."""
    if block and case.weights.shape[-1] % block:
        return "-"
    spec = replace(case.spec, rotation=block)
    record = METHODS[method].solve(replace(case, spec=spec)).records[0]
    return f"{record.error:.4f} / {record.output_error:.4f}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--blocks", nargs="+", type=int, default=(0, 16, 64, 128, 512))
    parser.add_argument("--methods", nargs="+", default=("qlora", "loftq", "fast"))
    parser.set_defaults(layers=LAYERS, rank=16)
    args: argparse.Namespace = parser.parse_args()
    cases = problems(args)
    names = (case.names[0].removeprefix("model.layers.") for case in cases)
    print(f"{args.model.name}, {args.format}, rank {args.rank}: weight error / output error")
    print(f"| method | block | {' | '.join(names)} |")
    print("|---|--:|" + "--:|" * len(cases))
    for method in args.methods:
        for block in args.blocks:
            cells = (cell(method, case, block) for case in cases)
            print(f"| {method} | {block} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
