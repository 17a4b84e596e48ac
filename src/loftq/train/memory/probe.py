"""What one block of a model saves and takes, by walking through it with fake tensors.

The model is built as it will be trained (packed layers, adapters, checkpointing, autocast), cut to
one and to two blocks, and run forward and backward under a mode that counts live bytes. Nothing is
computed or allocated. The difference of the two runs is what a block keeps for its backward; the
peak above what was kept is what a block needs while it is computed again and differentiated. So
each figure is what the code really does, for any architecture, and none is fitted.

Not seen by operators and counted here: the attention kernel's own buffers (`_Flash`), the dense
copy of a packed weight inside its linear layer (`dense_bytes`), and what plain PyTorch takes for
the operators between products (`pointwise_scratch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from loftq.integrations.builders import BUILDERS
from loftq.integrations.structure import examine
from loftq.integrations.training import fuse_for_training
from loftq.nn import replace_layer
from loftq.ops.panels import panel_rows
from loftq.train.memory.live import LiveBytes
from loftq.train.memory.subject import Subject, UnknownModel

REFERENCE_SCRATCH = 9
"""Bytes that the plain PyTorch dequantization takes for each weight besides its result."""
POINTWISE_SCRATCH = 16
"""Bytes that plain PyTorch takes for each element of a norm, rotation or gate beside the result."""
POINTWISE = ("rms_norm", "rms_norm_backward", "rotate", "gate", "gate_backward", "gate_backward_")
WALK = "loftq_walk"
"""Name of the attention that is walked through."""


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Bytes of one block, and of what comes before and after all blocks."""

    kept: int
    """Kept by one block from its forward to its backward."""
    working: int
    """Above everything that is kept: the most that one block's backward takes (with
    checkpointing, its second forward too)."""
    outside: int
    """Kept by the parts before and after the blocks: last norm, rotary tables, mask."""
    forward: int
    """Above what is kept: the most that one block's forward takes."""
    copies: int
    """16-bit copies of one block's adapters that autocast keeps until the forward ends."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a training step is computed."""

    batch_size: int
    length: int
    dtype: torch.dtype
    autocast: bool
    checkpointing: bool
    fused: bool
    padded: bool
    device: str


def block_cost(subject: Subject, step: Step) -> BlockCost:
    """Walk through one and two blocks of `subject`.

    Raises:
        UnknownModel: the model does not run with fake tensors.
    """
    one, two = _walk(subject, step, 1), _walk(subject, step, 2)
    kept = two.after_forward - one.after_forward
    return BlockCost(
        kept=kept,
        working=one.backward_peak - one.after_forward,
        outside=one.after_forward - kept,
        forward=one.forward_peak - one.after_forward,
        copies=two.copies - one.copies,
    )


@dataclass(frozen=True)
class _Walked:
    after_forward: int
    forward_peak: int
    backward_peak: int
    copies: int


def _walk(subject: Subject, step: Step, blocks: int) -> _Walked:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        model = _trained_model(subject, step, blocks)
        with mode:
            model.to_empty(device="cpu")
            with _counting(step) as live:
                return _run(model, step, live)
    except UnknownModel:
        raise
    except Exception as error:  # a foreign forward that asks a fake tensor for its values
        raise UnknownModel(
            f"{subject.name}: cannot be walked through without data "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}), so its training memory "
            "is not predicted. Measure a short run instead: `loftq train` prints its peak."
        ) from error


def _run(model: nn.Module, step: Step, live: LiveBytes) -> _Walked:
    trunk = model.get_base_model().base_model  # type: ignore[operator]
    shape = (step.batch_size, step.length)
    ids = torch.empty(shape, dtype=torch.long)
    mask = torch.empty(shape, dtype=torch.long) if step.padded else None
    live.ignore(*model.parameters(), *model.buffers())
    base = live.live
    with _autocast(step):
        hidden = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        inside = live.live - base
    after = live.live - base
    forward_peak = live.peak - base
    live.reset()
    loss = _Loss.apply(hidden)
    del hidden
    loss.backward()
    return _Walked(after, forward_peak, live.peak - base, inside - after)


class _Loss(torch.autograd.Function):
    """Keeps the hidden states until their gradient is there, and nothing longer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(*ctx.saved_tensors)


def _trained_model(subject: Subject, step: Step, blocks: int) -> nn.Module:
    """The model with its packed layers and adapters, cut to a few blocks, on the meta device."""
    from peft import LoraConfig, get_peft_model

    model = subject.build()
    _cut(model, blocks)
    inside = {path for path, _ in model.named_modules()}
    weights = [w for w in subject.weights if w.info.module in inside]
    with torch.device("meta"):
        for weight in weights:
            if weight.rank:  # tables are looked up and are outside of what is walked
                replace_layer(model, weight.info.module, weight.spec, builders=BUILDERS)
    model.to(step.dtype)
    _attend_by_walk()
    model.config._attn_implementation = WALK  # type: ignore[union-attr]
    adapted = [w for w in weights if w.rank]
    config = LoraConfig(
        r=max(w.rank for w in adapted),
        target_modules=[w.info.module for w in adapted],
        fan_in_fan_out=any(w.info.kind == "conv1d" for w in adapted),
    )
    wrapped: nn.Module = get_peft_model(model, config, low_cpu_mem_usage=True)
    if step.checkpointing:
        # A backward is a torch function, inside of which function modes are off.
        again = (contextlib.nullcontext(), _KernelAttention(step.device))
        options = {"use_reentrant": False, "context_fn": lambda: again}
        model.gradient_checkpointing_enable(options)  # type: ignore[operator]
    if step.fused:
        fuse_for_training(wrapped)
    return wrapped.train()


def _cut(model: nn.Module, blocks: int) -> None:
    """Keep the first `blocks` blocks."""
    anatomy = examine(model)
    lists = {path.rpartition(".")[0] for path, depth in anatomy.blocks.items() if depth is not None}
    if len(lists) != 1:
        raise UnknownModel(
            f"{type(model).__name__}: {len(lists)} stacks of blocks; training memory is predicted "
            "for models with one. Measure a short run instead."
        )
    path = lists.pop()
    model.set_submodule(path, nn.ModuleList(list(model.get_submodule(path).children())[:blocks]))
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, blocks)


@contextlib.contextmanager
def _counting(step: Step) -> Iterator[LiveBytes]:
    scratch = {
        torch.ops.loftq.quant_linear.default: lambda args, result: dense_bytes(
            result.shape[-1], args[0].shape[-1], args[0].dtype, step.device
        ),
        torch.ops.loftq.quant_linear_backward.default: lambda args, result: dense_bytes(
            args[1].shape[0], args[5], args[0].dtype, step.device
        ),
        torch.ops.loftq.dequantize.default: lambda args, result: dequantize_scratch(
            result.numel(), step.device
        ),
    }
    for name in POINTWISE:
        operator = getattr(torch.ops.loftq, name).default
        scratch[operator] = lambda args, result: pointwise_scratch(args[0].numel(), step.device)
    with LiveBytes(scratch) as live, _KernelAttention(step.device):
        yield live


def dense_bytes(rows: int, columns: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the dense copy of a packed weight, or of a panel of it, inside a linear layer."""
    kind = torch.device(device)
    panel = panel_rows(rows, columns, kind) * columns
    return panel * dtype.itemsize + dequantize_scratch(panel, device)


def dequantize_scratch(weights: int, device: str) -> int:
    """Bytes that dequantizing takes besides its result: none in the GPU kernel."""
    return 0 if torch.device(device).type == "cuda" else REFERENCE_SCRATCH * weights


def pointwise_scratch(elements: int, device: str) -> int:
    """Bytes that an operator between products takes besides its result: none in the GPU kernel."""
    return 0 if torch.device(device).type == "cuda" else POINTWISE_SCRATCH * elements


def _autocast(step: Step) -> Any:
    if not step.autocast or step.dtype == torch.float32:
        return contextlib.nullcontext()
    # Fake tensors are on the CPU, whose autocast knows bfloat16 as CUDA's knows both 16-bit types.
    return torch.autocast("cpu", dtype=step.dtype)


@cache
def _attend_by_walk() -> None:
    """Make WALK an attention of transformers: its "sdpa", decided without looking at values.

    With real tensors "sdpa" makes no mask where no row is padded, which it cannot see in fake ones.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:  # the kernels that take a mask want all heads
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return out.transpose(1, 2).contiguous(), None

    def mask(batch_size: int, *_: Any, attention_mask: Tensor | None = None, **__: Any) -> Any:
        if attention_mask is None:
            return None
        length = attention_mask.shape[-1]
        return torch.empty((batch_size, 1, length, length), dtype=torch.bool)

    AttentionInterface.register(WALK, attend)
    AttentionMaskInterface.register(WALK, mask)


class _KernelAttention(TorchFunctionMode):
    """Attention as its fused kernels do it: the output and a log-sum-exp are kept, no scores."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # the kernels add a bias
        return _Flash.apply(query, key, value, attn_mask, self._device)


class _Flash(torch.autograd.Function):
    """The memory of a fused attention: q (batch, heads, length, width), k and v of fewer heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, device: str) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty((batch, heads, length)).float())
        ctx.device = device
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _, _ = ctx.saved_tensors
        accumulator = None
        if torch.device(ctx.device).type == "cuda":
            accumulator = torch.empty(q.shape, dtype=torch.float32)
        dq = torch.empty_like(q)
        groups = q.shape[1] // k.shape[1]
        # With fewer key than query heads the kernels write a gradient per query head and sum.
        dk = k.new_empty((k.shape[0], k.shape[1], groups, *k.shape[2:]))
        dv = v.new_empty((v.shape[0], v.shape[1], groups, *v.shape[2:]))
        del accumulator
        if groups > 1:
            return dq, dk.sum(2), dv.sum(2), None, None
        return dq, dk.squeeze(2), dv.squeeze(2), None, None
