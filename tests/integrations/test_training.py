"""The training layer: the same loss and gradients as the stock path, and no dense weight kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import loftq
import zoo
from loftq.integrations.training import fuse_for_training, undo_training
from loftq.nn.group import Adapted, project
from loftq.train.prepare import prepare_for_training
from tolerances import FLOAT32_SOLVE

WHOLE = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "gemma2": 9, "gemma3": 13}
"""Families that the layer covers whole -> norms of the tiny model."""


def packed(name: str, **options: Any) -> Any:
    """A tiny model with adapters that do something, in training mode."""
    torch.manual_seed(0)
    model = loftq.quantize_model(zoo.build(name), **{"rank": 4, "method": "qlora", **options})
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1)
    return model.train()


def step(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every adapter."""
    model.zero_grad()
    ids = zoo.tokens()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same(found: Any, wanted: Any) -> None:
    """Equal to float32 rounding."""
    (loss, grads), (wanted_loss, wanted_grads) = found, wanted
    torch.testing.assert_close(loss, wanted_loss, rtol=FLOAT32_SOLVE, atol=0)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        size = wanted_grads[name].abs().max()
        torch.testing.assert_close(grad, wanted_grads[name], rtol=0, atol=FLOAT32_SOLVE * size)


@pytest.mark.parametrize("checkpointing", ["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("name", list(WHOLE))
def test_loss_and_gradients_are_those_of_the_stock_path(name: str, checkpointing: str) -> None:
    model = packed(name)
    wanted = step(model)
    plan = fuse_for_training(model)
    assert [len(group) for group in plan.grouped] == [3, 1, 2, 1] * zoo.BLOCKS
    assert (plan.norms, plan.rotary, plan.gates) == (WHOLE[name], zoo.BLOCKS, zoo.BLOCKS)
    assert not plan.left
    if checkpointing:
        reentrant = checkpointing == "reentrant"
        prepare_for_training(model, reentrant=reentrant)
    assert_same(step(model), wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_adapters_on_dense_layers_take_the_same_path(name: str) -> None:
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "query", "key", "intermediate.dense"]
    options = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(zoo.build(name), options).eval()  # without dropout
    inputs = zoo.ZOO[name].inputs()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    wanted = run()
    plan = fuse_for_training(model)
    assert sum(map(len, plan.grouped)) == len(wanted[1]) // 2
    assert_same(run(), wanted)


def test_a_dense_layer_that_is_trained_runs_peft() -> None:
    model = get_peft_model(zoo.build("llama"), LoraConfig(r=4, target_modules=["o_proj"]))
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" in path or parameter.requires_grad)
    plan = fuse_for_training(model)
    assert not plan.grouped
    assert set(plan.left.values()) == {"its weight is trained"}


def test_going_backward_twice_is_refused() -> None:
    model = packed("llama")
    fuse_for_training(model)
    loss = model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("name", ["phi", "phi3", "gpt2", "bert", "mixtral", "opt"])
def test_other_families_take_what_fits_them(name: str) -> None:
    model = packed(name, allow_uncovered=name == "mixtral")
    inputs = zoo.ZOO[name].inputs()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)  # of dropout
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    wanted = run()
    fuse_for_training(model)
    assert_same(run(), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_is_as_near_to_float32_as_the_stock_path(name: str) -> None:
    model = packed(name)
    reference = step(model)[1]
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    errors = []
    for fused in (False, True):
        if fused:
            fuse_for_training(half)
        grads = step(half, torch.bfloat16)[1]
        parts = [(grads[n] - g).norm() / g.norm() for n, g in reference.items()]
        errors.append(torch.stack(parts).square().mean().sqrt())
    stock, ours = errors
    assert 0 < ours <= 1.2 * stock


def test_no_dense_weight_is_kept_for_the_backward() -> None:
    model = packed("llama")
    fuse_for_training(model)
    dense = {tuple(m.packed_shape) for m in model.modules() if hasattr(m, "packed_shape")}
    dense |= {shape[::-1] for shape in dense}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
    assert kept
    assert not dense & set(kept)


def test_checkpointing_never_repeats_the_last_product_of_a_block() -> None:
    model = packed("llama")
    prepare_for_training(model)
    calls: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.loftq.dequantize.default:
                calls.append(args[4])  # in_features
            return func(*args, **(kwargs or {}))

    with Counting():
        model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss.backward()
    assert calls.count(zoo.ODD) == 2 * zoo.BLOCKS  # down_proj: forward and backward
    assert calls.count(zoo.WIDTH) == 3 * 6 * zoo.BLOCKS  # the others once more in between


def test_gradients_add_up_over_batches_and_unused_outputs_are_none() -> None:
    model = packed("llama")
    fuse_for_training(model)
    attention = model.get_base_model().model.layers[0].self_attn
    group = [
        Adapted(m.base_layer, m.lora_A["default"].weight, m.lora_B["default"].weight, 2.0)
        for m in (attention.q_proj, attention.k_proj)
    ]
    x = torch.randn(3, zoo.WIDTH, requires_grad=True)
    q, _ = project(x, group)
    q.sum().backward()
    assert group[1].B.grad is None
    dense = group[0].layer.dequantize() + 2 * group[0].B @ group[0].A
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    once = group[0].A.grad.clone()
    project(x, group)[0].sum().backward()
    torch.testing.assert_close(group[0].A.grad, 2 * once)


def test_an_adapter_that_changes_before_the_backward_is_refused() -> None:
    model = packed("llama")
    fuse_for_training(model)
    loss = model(input_ids=zoo.tokens(), labels=zoo.tokens()).loss
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between"):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "groups"), [("bert", [3, 1, 1, 1]), ("mpnet", [3, 1, 1, 1]), ("t5", [1])]
)
def test_projections_of_encoders_are_groups_unless_they_attend_elsewhere(
    name: str, groups: list[int]
) -> None:
    sizes = [len(group) for group in fuse_for_training(packed(name)).grouped]
    assert sizes == groups * (len(sizes) // len(groups))


def _replaced(layer: Any) -> None:
    factor = layer.lora_B["default"]
    factor.weight = nn.Parameter(2 * factor.weight.detach())


def _scaled(layer: Any) -> None:
    layer.scaling["default"] = 3.0


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.merge(),
        lambda layer: layer.lora_A["default"].requires_grad_(False),
        _replaced,
        _scaled,
    ],
    ids=["disabled", "merged", "frozen", "replaced", "scaled"],
)
def test_what_changes_in_a_layer_between_steps_is_seen(change: Callable[[Any], object]) -> None:
    model = packed("llama")
    stock = copy.deepcopy(model)
    fuse_for_training(model)
    step(model)
    for one in (model, stock):
        change(one.get_base_model().model.layers[0].mlp.down_proj)
    assert_same(step(model), step(stock))


def test_the_state_dict_and_a_merge_are_what_they_were() -> None:
    model = packed("llama")
    stock = copy.deepcopy(model)
    fuse_for_training(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    merged = [m.merge_and_unload()(input_ids=zoo.tokens()).logits for m in (model, stock)]
    torch.testing.assert_close(*merged)


def test_a_copy_computes_with_its_own_parameters() -> None:
    model = packed("llama")
    fuse_for_training(model)
    other = copy.deepcopy(model)
    step(other)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)


def test_undone_nothing_is_left() -> None:
    model = packed("gemma2")
    fuse_for_training(model)
    undo_training(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("options", "why"),
    [({"use_dora": True}, "no plain LoRA"), ({"lora_dropout": 0.1}, "dropout")],
)
def test_adapters_of_another_kind_run_peft_and_the_plan_says_so(
    options: dict[str, Any], why: str
) -> None:
    base = packed("llama").unload()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options))
    plan = fuse_for_training(model)
    assert not plan.grouped
    assert len(plan.left) == 2 * zoo.BLOCKS
    assert all(why in reason for reason in plan.left.values())
    assert why in str(plan)
    assert all(torch.isfinite(grad).all() for grad in step(model.train())[1].values())


def test_layers_that_are_no_linears_run_peft_and_the_plan_says_so() -> None:
    """GPT-2's Conv1D, whose weight lies the other way round."""
    plan = fuse_for_training(packed("gpt2"))
    assert not plan.grouped
    assert len(plan.left) == 4 * zoo.BLOCKS
    assert set(plan.left.values()) == {"QuantConv1D is no packed linear layer"}
    assert "8 layers run PEFT's forward (QuantConv1D is no packed linear layer)" in str(plan)


def test_an_adapter_on_a_part_of_a_group_is_a_group_of_its_own() -> None:
    base = packed("llama").unload()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1)
    wanted = step(model.train())
    plan = fuse_for_training(model)
    assert {len(group) for group in plan.grouped} == {1}
    assert_same(step(model), wanted)


class _Doubled(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * self.weight


def test_a_norm_that_computes_something_else_is_left_as_it_is() -> None:
    model = packed("llama")
    block = model.get_base_model().model.layers[0]
    block.input_layernorm = _Doubled(zoo.WIDTH)
    assert fuse_for_training(model).norms == WHOLE["llama"] - 1
    assert "forward" not in block.input_layernorm.__dict__


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_captured_step_gives_the_gradients_of_an_eager_one() -> None:
    """Also after the adapters changed: what is cast of them is cast inside of the graph."""
    model = packed("llama").cuda()
    prepare_for_training(model)
    ids = zoo.tokens().cuda()

    def run() -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.get_base_model().model(ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for gradient in (run(), run()):  # buffers that stay; kernels compiled
        torch._foreach_zero_(list(gradient.values()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    torch._foreach_zero_(list(captured.values()))
    graph.replay()
    found = {name: gradient.clone() for name, gradient in captured.items()}
    torch._foreach_zero_(list(captured.values()))
    wanted = run()
    assert all(gradient.any() for gradient in wanted.values())
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-5)
