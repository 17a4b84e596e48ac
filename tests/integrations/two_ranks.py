"""What tests/integrations/test_distributed.py runs under torchrun: one step on two ranks."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from loftq.integrations import _hook
from loftq.nn import packed_layers

_hook.install()


def peft_model(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": "orthogonal"}
    return get_peft_model(model, LoraConfig(**options)).train()


def step(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """One SGD step; the loss before it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def batches() -> torch.Tensor:
    return torch.arange(3, 43).view(2, 1, 20)


def reference(folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """The same step in one process on both batches."""
    model = peft_model(folder)
    trainable = [p for p in model.parameters() if p.requires_grad]
    losses = [model(input_ids=ids, labels=ids).loss for ids in batches()]
    torch.stack(losses).mean().backward()
    torch.optim.SGD(trainable, lr=0.5).step()
    return model, torch.stack(losses).detach()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def fsdp(folder: Path, rank: int, mixed: bool) -> None:
    wanted, losses = reference(folder)
    model = peft_model(folder)
    options = {}
    if mixed:
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for block in model.base_model.model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for layer in packed_layers(model).values():
        for parameter in layer.components().values():
            assert isinstance(parameter, DTensor)
            assert parameter.dtype == torch.uint8
            assert parameter.to_local().shape[0] < max(parameter.shape[0], 2)
    loss = step(model, batches()[rank])
    if mixed:
        torch.testing.assert_close(loss.float(), losses[rank], rtol=0.02, atol=0.02)
        return
    close(loss, losses[rank])
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        for name, tensor in wanted.state_dict().items():
            close(state[name], tensor)
        torch.save(state, folder / "full.pt")
        again = peft_model(folder)
        again.load_state_dict(torch.load(folder / "full.pt", weights_only=True))
        with torch.no_grad():
            close(again.eval()(batches()[0]).logits, wanted.eval()(batches()[0]).logits)
    dist.barrier()


def ddp(folder: Path, rank: int) -> None:
    wanted, losses = reference(folder)
    model = peft_model(folder)
    parallel = nn.parallel.DistributedDataParallel(model)
    # Bytes that differ between ranks stay different: no step sends them.
    layer = packed_layers(model)["base_model.model.model.layers.1.mlp.down_proj.base_layer"]
    before = layer.weight_packed.clone()
    loss = step(parallel, batches()[rank])
    close(loss, losses[rank])
    for name, parameter in model.named_parameters():
        close(parameter, wanted.get_parameter(name))
    with torch.no_grad():
        layer.weight_packed.fill_(rank)
    step(parallel, batches()[rank])
    assert torch.equal(layer.weight_packed, torch.full_like(before, rank))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kind, where = sys.argv[1], Path(sys.argv[2])
    if kind == "ddp":
        ddp(where, dist.get_rank())
    else:
        fsdp(where, dist.get_rank(), mixed=kind == "fsdp-mixed")
    dist.barrier()
    dist.destroy_process_group()
    # Everything is asserted by now. A thread of torch that still runs can abort the interpreter
    # while it is taken down ("terminate called without an active exception"), now and then.
    sys.stdout.flush()
    os._exit(0)
