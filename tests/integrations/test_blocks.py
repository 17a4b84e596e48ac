"""Block-by-block collection on every family of the zoo, against hooks on the whole loaded model."""

from pathlib import Path

import pytest
import torch

import zoo
from loftq.calibration import TokenWindows, collect
from loftq.checkpoint import open_checkpoint
from loftq.integrations.blocks import CheckpointBlocks, LoadedBlocks
from loftq.integrations.discover import SourceError, describe_folder

FAMILIES = ("llama", "gpt2", "bert", "mpnet", "deberta-v3", "t5", "bart")


def windows(padded: bool) -> TokenWindows:
    ids = zoo.tokens(6, 9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, 5:] = mask[4, 7:] = False
        ids = ids.masked_fill(~mask, 0)
    return TokenWindows(ids=ids, mask=mask, source="zoo")


def gathered(model, layers, tokens, chunk=2):
    found, leaders = {}, {}

    def keep(block, statistics, of):
        found.update(statistics)
        leaders.update(of)

    collect(model, layers, tokens, "gram", on_block=keep, chunk=chunk)
    return found, leaders


def layers_of(folder: Path) -> dict[str, int]:
    source = open_checkpoint(folder)
    layout = describe_folder(folder, {n: e.shape for n, e in source.tensors.items()})
    return {layer.module: layer.shape[1] for layer in layout.layers}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n in zoo.ZOO])
def test_blocks_from_the_checkpoint_see_what_the_whole_model_sees(
    name: str, padded: bool, tmp_path: Path
) -> None:
    model = zoo.build(name)
    folder = zoo.save(model, tmp_path / name)
    layers, tokens = layers_of(folder), windows(padded)
    inputs: dict[str, list[torch.Tensor]] = {path: [] for path in layers}
    for path in layers:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs[path].append(args[0])
        )
    with torch.no_grad():
        LoadedBlocks(model).forward(tokens.ids, tokens.mask)
    blocks = CheckpointBlocks(folder, open_checkpoint(folder), torch.device("cpu"))
    found, leaders = gathered(blocks, layers, tokens)
    assert leaders.keys() == layers.keys()
    for path, seen in inputs.items():
        seen = [part for part in seen if part.shape[:-1].numel() == tokens.mask.numel()]
        x = torch.cat([part.reshape(6, 9, -1)[tokens.mask] for part in seen]).double()
        one = found[leaders[path]]
        assert one.tokens == len(x) == len(seen) * tokens.tokens
        assert torch.allclose(one.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(one.mean_square, x.square().mean(0), rtol=1e-4, atol=1e-6)


def test_projections_of_one_input_share_a_gram_and_no_block_stays(tmp_path: Path) -> None:
    folder = zoo.save(zoo.build("llama"), tmp_path / "llama")
    blocks = CheckpointBlocks(folder, open_checkpoint(folder), torch.device("cpu"))
    alive: list[set[str]] = []
    real = blocks.load

    def load(block: str) -> None:
        real(block)
        held = {n for n, p in blocks.module.named_parameters() if p.device.type != "meta"}
        alive.append({".".join(n.split(".")[:3]) for n in held if ".layers." in n})

    blocks.load = load  # type: ignore[method-assign]
    _, leaders = gathered(blocks, layers_of(folder), windows(False))
    assert alive == [{"model.layers.0"}, {"model.layers.1"}]
    block = {path.split(".", 3)[3]: leader.split(".", 3)[3] for path, leader in leaders.items()
             if path.startswith("model.layers.1.")}  # fmt: skip
    first = "self_attn.q_proj"
    assert block["self_attn.k_proj"] == block["self_attn.v_proj"] == block[first] == first
    assert block["mlp.up_proj"] == block["mlp.gate_proj"] == "mlp.gate_proj"
    assert block["mlp.down_proj"] == "mlp.down_proj"


def test_the_result_does_not_depend_on_how_windows_are_cut(tmp_path: Path) -> None:
    model = zoo.build("llama")
    folder = zoo.save(model, tmp_path / "llama")
    layers, tokens = layers_of(folder), windows(False)
    whole, _ = gathered(LoadedBlocks(model), layers, tokens, chunk=6)
    cut, _ = gathered(LoadedBlocks(model), layers, tokens, chunk=1)
    for path, found in whole.items():
        assert torch.allclose(found.gram, cut[path].gram, rtol=1e-4, atol=1e-6)


def test_dropout_is_off_for_every_chunk_and_the_mode_is_put_back() -> None:
    """The zoo's encoders have dropout: a chunk in training mode would differ."""
    tokens, layers = windows(False), {"bert.encoder.layer.1.output.dense": zoo.ODD}
    quiet, busy = zoo.build("bert"), zoo.build("bert").train()
    expected, _ = gathered(LoadedBlocks(quiet), layers, tokens)
    found, _ = gathered(LoadedBlocks(busy), layers, tokens)
    assert busy.training
    assert not quiet.training
    for path in expected:
        assert torch.equal(found[path].gram, expected[path].gram)


def test_an_error_inside_a_forward_reaches_the_caller(tmp_path: Path) -> None:
    model = zoo.build("llama")
    tokens = windows(False)
    tokens.ids[3, 3] = 10**6
    with pytest.raises(IndexError):
        gathered(LoadedBlocks(model), {"model.layers.0.mlp.up_proj": zoo.WIDTH}, tokens)


def test_a_block_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    folder = zoo.save(zoo.build("llama"), tmp_path / "llama")
    blocks = CheckpointBlocks(folder, open_checkpoint(folder), torch.device("cpu"))
    blocks.names.sources.pop("model.layers.1.mlp.up_proj.weight")  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight: is not there"):
        gathered(blocks, {"model.layers.1.mlp.down_proj": zoo.ODD}, windows(False))


def mixed(folder: Path) -> Path:
    """A checkpoint of bfloat16 weights whose norms are float32."""
    model = zoo.build("llama").bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    return zoo.save(model, folder)


def test_a_checkpoint_of_two_dtypes_runs_in_the_commoner_one(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "mixed")
    source = open_checkpoint(folder)
    assert {entry.dtype for entry in source.tensors.values()} == {"BF16", "F32"}
    blocks = CheckpointBlocks(folder, source, torch.device("cpu"))
    assert blocks.dtype == torch.float32  # a CPU always does
    assert blocks._commonest_dtype() == torch.bfloat16


@pytest.mark.gpu
def test_a_checkpoint_of_two_dtypes_runs_on_the_gpu(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "mixed")
    layers, tokens = layers_of(folder), windows(False)
    found, _ = gathered(
        CheckpointBlocks(folder, open_checkpoint(folder), torch.device("cuda")), layers, tokens
    )
    wanted, _ = gathered(
        CheckpointBlocks(folder, open_checkpoint(folder), torch.device("cpu")), layers, tokens
    )
    for path, one in wanted.items():
        assert torch.allclose(found[path].gram.cpu(), one.gram, rtol=0.1, atol=0.1), path
