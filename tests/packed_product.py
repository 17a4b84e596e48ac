"""A packed product with its adapter and a float64 answer, for every kernel that computes it."""

import torch

from loftq.formats import parse_format
from loftq.ops.reference import dequantize_reference
from packed_folder import random_quantized
from tolerances import KERNEL_ERROR_RATIO


class Problem:
    """One packed product with its adapter: the operator's arguments and a float64 answer."""

    def __init__(self, name, rows, columns, tokens, dtype, device, rank=5):
        spec, q = parse_format(name), random_quantized(rows, columns, name)
        stored = (q.weight_packed, q.weight_scale, q.weight_zero, q.weight_nested)
        layout = (spec.bits, spec.group_size, spec.scale_coding, spec.levels, spec.default_zero)
        generator = torch.Generator().manual_seed(tokens)
        shapes = ((tokens, columns), (rank, columns), (rows, rank))
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.x, self.lora_A, self.lora_B = (tensor.to(device) for tensor in drawn)
        W = dequantize_reference(*stored, columns, *layout, torch.float32).to(device)
        self.stored = [None if t is None else t.to(device) for t in stored]
        self.packed = (*self.stored, *layout)
        self.adapter = (self.lora_A, self.lora_B, 0.5)
        self.exact = self.x.double() @ W.double().T
        self.size = (self.x.double().square() @ W.double().square().T).sqrt()
        self.extra = 0.5 * (self.x.double() @ self.lora_A.double().T) @ self.lora_B.double().T
        self.plain = self.x @ W.to(dtype).T

    def low(self):
        """What the adapter adds, in x's dtype."""
        return 0.5 * (self.x @ self.lora_A.T) @ self.lora_B.T

    def check(self, y, adapter=False):
        """At most twice the error of the dense product, which rounds W to x's dtype.

        Of a single value that product may come close by chance: what rounding W's levels costs a
        sum of this length, and rounding y after it, is always allowed.
        """
        exact = self.exact + self.extra if adapter else self.exact
        plain = self.plain + self.low() if adapter else self.plain
        allowed = KERNEL_ERROR_RATIO * (plain.double() - exact).norm()
        rounding = torch.finfo(y.dtype).eps / 2 * (self.size + exact.abs()).norm()
        assert (y.double() - exact).norm() <= torch.maximum(allowed, rounding)


class Stacked(Problem):
    """A problem each of whose tokens has its own part of the rank."""

    def stack(self, stacked):
        tokens, rank = len(self.x), len(self.lora_A)
        token = torch.arange(tokens, device=self.x.device) // (tokens // stacked)
        row = torch.arange(rank, device=self.x.device) // (rank // stacked)
        self.own = token[:, None] == row
        ax = self.own * (self.x.double() @ self.lora_A.double().T)
        self.extra = 0.5 * ax @ self.lora_B.double().T

    def low(self):
        return 0.5 * (self.own * (self.x @ self.lora_A.T)) @ self.lora_B.T


def check_overlap(chain):
    """Captured in a graph and replayed, overlapping launches give the bits of plain ones.

    chain: overlap -> a CUDA tensor, each launch reading what the one before it wrote.
    """
    wanted = chain(False)
    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(True)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)
