"""Every family of the zoo: what is packed, what is kept and why, and where it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertForMaskedLM, DebertaV2Config, DebertaV2Model
from transformers.pytorch_utils import Conv1D

import zoo
from loftq.formats import parse_format
from loftq.integrations import discover, structure, tensor_names
from loftq.pipeline.accounting import paper_ratio
from loftq.pipeline.layout import ModelLayout

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
GATED = ["down_proj", "gate_proj", "up_proj"]
DEBERTA = ["dense", "dense", "dense", "key_proj", "query_proj", "value_proj"]

# Names of the linears of one block (a decoder's block where there are two kinds), and what is kept
# outside of the embeddings, which always are.
EXPECTED: dict[str, tuple[list[str], dict[str, str]]] = {
    "llama": (ATTENTION + GATED, {"lm_head": "output head"}),
    "llama-tied": (ATTENTION + GATED, {"lm_head": "tied to the embedding"}),
    "mistral": (ATTENTION + GATED, {"lm_head": "output head"}),
    "qwen2": (ATTENTION + GATED, {"lm_head": "output head"}),
    "qwen3": (ATTENTION + GATED, {"lm_head": "output head"}),
    "gemma2": (ATTENTION + GATED, {"lm_head": "tied to the embedding"}),
    "gemma3": (ATTENTION + GATED, {"lm_head": "tied to the embedding"}),
    "phi": (["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"], {"lm_head": "output head"}),
    "phi3": (["down_proj", "gate_up_proj", "o_proj", "qkv_proj"], {"lm_head": "output head"}),
    "falcon": (
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
        {"lm_head": "output head"},
    ),
    "opt": (
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        {"lm_head": "tied to the embedding"},
    ),
    "opt-projected": (
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        {
            "model.decoder.project_in": "outside the blocks",
            "model.decoder.project_out": "outside the blocks",
            "lm_head": "tied to the embedding",
        },
    ),
    "gpt2": (["c_attn", "c_fc", "c_proj", "c_proj"], {"lm_head": "tied to the embedding"}),
    "bert": (
        ["dense", "dense", "dense", "key", "query", "value"],
        {"bert.pooler.dense": "pooler", "classifier": "classifier"},
    ),
    "bert-masked": (
        ["dense", "dense", "dense", "key", "query", "value"],
        {
            "cls.predictions.transform.dense": "output head",
            "cls.predictions.decoder": "tied to the embedding",
        },
    ),
    "roberta": (
        ["dense", "dense", "dense", "key", "query", "value"],
        {"classifier.dense": "classifier", "classifier.out_proj": "classifier"},
    ),
    "deberta-v2": (
        [*DEBERTA, "pos_key_proj", "pos_query_proj"],
        {
            "deberta.encoder.conv.conv": "convolution",
            "pooler.dense": "pooler",
            "classifier": "classifier",
        },
    ),
    "deberta-v3": (DEBERTA, {"pooler.dense": "pooler", "classifier": "classifier"}),
    "mpnet": (
        ["dense", "dense", "k", "o", "q", "v"],
        {"classifier.dense": "classifier", "classifier.out_proj": "classifier"},
    ),
    "bart": (
        ["fc1", "fc2"] + 2 * ["k_proj", "out_proj", "q_proj", "v_proj"],
        {"lm_head": "tied to the embedding"},
    ),
    "t5": (["wi_0", "wi_1", "wo"] + 2 * ["k", "o", "q", "v"], {"lm_head": "tied to the embedding"}),
    "vit": (
        ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"],
        {"vit.embeddings.patch_embeddings.projection": "convolution", "classifier": "classifier"},
    ),
    "mixtral": (
        ATTENTION,
        {
            **{f"model.layers.{i}.mlp.gate.weight": "router" for i in (0, 1)},
            **{
                f"model.layers.{i}.mlp.experts.{name}": "expert tensors"
                for i in (0, 1)
                for name in ("gate_up_proj", "down_proj")
            },
            "lm_head": "output head",
        },
    ),
    "qwen2-moe": (
        ATTENTION + GATED,
        {
            **{f"model.layers.{i}.mlp.gate.weight": "router" for i in (0, 1)},
            **{f"model.layers.{i}.mlp.shared_expert_gate": "router" for i in (0, 1)},
            **{
                f"model.layers.{i}.mlp.experts.{name}": "expert tensors"
                for i in (0, 1)
                for name in ("gate_up_proj", "down_proj")
            },
            "lm_head": "output head",
        },
    ),
    "llava": (
        ATTENTION + GATED,
        {
            "model.vision_tower.embeddings.patch_embedding": "convolution",
            "model.multi_modal_projector.linear_1": "outside the blocks",
            "model.multi_modal_projector.linear_2": "outside the blocks",
            "lm_head": "output head",
        },
    ),
}
NAMES = list(zoo.ZOO)


def shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def describe(folder: Path, **options) -> ModelLayout:
    return discover.describe_folder(folder, shapes(folder), **options)


def saved(name: str, folder: Path) -> Path:
    return zoo.save(zoo.build(name), folder)


def rename_tensors(folder: Path, rename) -> dict[str, list[int]]:
    return {rename(name): shape for name, shape in shapes(folder).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_model_runs(name):
    model = zoo.build(name)
    with torch.no_grad():
        output = model(**zoo.ZOO[name].inputs())
    assert torch.isfinite(output.logits).all()
    assert "labels" not in zoo.ZOO[name].inputs() or torch.isfinite(output.loss)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_linears_of_the_blocks_are_targets(name):
    layout = discover.describe_model(zoo.build(name))
    linears, kept = EXPECTED[name]
    last = [layer for layer in layout.layers if layer.depth == layout.blocks - 1]
    assert sorted(layer.module.split(".")[-1] for layer in last) == sorted(linears)
    others = {k.module: k.reason for k in layout.kept if not is_embedding(name, k.module)}
    assert others == kept
    assert layout.blocks == (4 if name in ("bart", "t5") else 2)
    assert {layer.depth for layer in layout.layers} - {None} == set(range(layout.blocks))


def is_embedding(name: str, module: str) -> bool:
    model = zoo.build(name)
    try:
        return isinstance(model.get_submodule(module), nn.Embedding)
    except AttributeError:  # a parameter
        return False


@pytest.mark.parametrize("name", NAMES)
def test_every_embedding_is_kept_with_a_reason(name):
    model = zoo.build(name)
    kept = {k.module: k for k in discover.describe_model(model).kept}
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert {kept[n].reason for n in embeddings} <= {"embedding", "tied to the embedding"}
    assert all(kept[n].parameters == m.weight.numel() for n, m in embeddings.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("headless", [False, True])
def test_every_target_is_found_in_what_transformers_saves(name, headless, tmp_path):
    model = (zoo.build_base if headless else zoo.build)(name)
    zoo.save(model, tmp_path)
    layout = describe(tmp_path)
    assert layout.architecture == type(model).__name__
    loaded = discover.describe_model(model)
    assert [x.module for x in layout.layers] == [x.module for x in loaded.layers]
    assert [x.shape for x in layout.layers] == [x.shape for x in loaded.layers]
    assert layout.kept == loaded.kept
    assert_tensors_are_the_weights(layout, model, tmp_path)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("mixtral", "qwen2-moe")])
def test_a_head_is_described_over_a_checkpoint_of_the_base_model(name, tmp_path):
    full, base = zoo.build(name), zoo.build_base(name)
    zoo.save(base, tmp_path / "base")
    full.config.save_pretrained(tmp_path / "base")
    write_architecture(tmp_path / "base", type(full).__name__)
    layout = describe(tmp_path / "base")
    expected = [layer.module for layer in discover.describe_model(full).layers]
    assert [layer.module for layer in layout.layers] == expected
    loaded = type(full).from_pretrained(tmp_path / "base")
    assert_tensors_are_the_weights(layout, loaded, tmp_path / "base")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "t5"])  # its base has the same names
def test_the_base_model_is_described_over_a_checkpoint_with_a_head(name, tmp_path):
    saved(name, tmp_path)
    base = zoo.build_base(name)
    write_architecture(tmp_path, type(base).__name__)
    layout = describe(tmp_path)
    assert layout.architecture == type(base).__name__
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_tensors_are_the_weights(layout, loaded, tmp_path)


def assert_tensors_are_the_weights(layout: ModelLayout, model: nn.Module, folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        for layer in layout.layers:
            weight = model.get_submodule(layer.module).weight
            assert torch.equal(file.get_tensor(layer.tensor), weight), layer


def write_architecture(folder: Path, name: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = None if name is None else [name]
    (folder / "config.json").write_text(json.dumps(config))


def test_renamed_checkpoints_are_read_as_transformers_reads_them(tmp_path):
    layout = describe(saved("vit", tmp_path))
    stored = {layer.module: layer.tensor for layer in layout.layers}
    assert any(tensor != f"{module}.weight" for module, tensor in stored.items())


def test_prefixes_are_enough_without_the_private_parts_of_transformers(tmp_path, monkeypatch):
    zoo.save(zoo.build_base("llama"), tmp_path)
    write_architecture(tmp_path, "LlamaForCausalLM")
    expected = describe(tmp_path)
    monkeypatch.setattr(tensor_names, "_loader", lambda model: None)
    assert describe(tmp_path) == expected


def test_conv1d_is_described_in_linear_orientation(tmp_path):
    layout = describe(saved("gpt2", tmp_path))
    attention = layout.layers[0]
    assert (attention.kind, attention.shape) == ("conv1d", (3 * zoo.WIDTH, zoo.WIDTH))
    assert shapes(tmp_path)[attention.tensor] == [zoo.WIDTH, 3 * zoo.WIDTH]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_decoder_depth_goes_on_after_the_encoder(name):
    layout = discover.describe_model(zoo.build(name))
    for layer in layout.layers:
        assert (layer.depth >= zoo.BLOCKS) == ("decoder" in layer.module)


def test_towers_beside_the_text_model_have_no_depth():
    layout = discover.describe_model(zoo.build("llava"))
    vision = [layer for layer in layout.layers if "vision_tower" in layer.module]
    assert len(vision) == 3 * 6
    assert {layer.depth for layer in vision} == {None}
    assert layout.blocks == 2


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_experts_count_against_coverage(name):
    model = zoo.build(name)
    layout = discover.describe_model(model)
    experts = sum(k.parameters for k in layout.kept if k.reason == "expert tensors")
    assert experts == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    quantized = sum(out * columns for out, columns in (layer.shape for layer in layout.layers))
    assert layout.coverage == pytest.approx(quantized / (quantized + experts))
    assert layout.coverage < 0.8


def test_experts_kept_as_single_linears_are_targets_and_their_router_is_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = BertConfig(num_experts=3)
            self.layers = nn.ModuleList(Block() for _ in range(3))

    layout = discover.describe_model(Experts())
    assert len(layout.layers) == 9
    assert {k.module: k.reason for k in layout.kept} == {
        f"layers.{i}.router": "router" for i in range(3)
    }


def test_task_types():
    found = {name: discover.describe_model(zoo.build(name)).task_type for name in NAMES}
    causal = {n for n in NAMES if zoo.ZOO[n].auto.__name__ == "AutoModelForCausalLM"} | {"llava"}
    assert {n for n in NAMES if found[n] == "CAUSAL_LM"} == causal
    assert {n for n in NAMES if found[n] == "SEQ_2_SEQ_LM"} == {"bart", "t5"}
    assert found["bert"] == found["deberta-v3"] == "SEQ_CLS"
    assert found["bert-masked"] is found["vit"] is None
    assert discover.task_type("BertModel") == "FEATURE_EXTRACTION"
    assert discover.task_type("BertForTokenClassification") == "TOKEN_CLS"
    assert discover.task_type("BertForQuestionAnswering") == "QUESTION_ANS"
    assert discover.task_type("NoSuchModel") is None


def test_model_class_is_the_one_config_names(tmp_path):
    saved("bert-masked", tmp_path)
    assert discover.model_class(tmp_path) is BertForMaskedLM
    for other in ("LlamaForCausalLM", "pipeline", "AutoModel", "__name__", "NoSuchModel", None):
        write_architecture(tmp_path, other)
        assert discover.model_class(tmp_path) is AutoModel
    assert describe(tmp_path).architecture == "BertModel"


# --- targets and skip


def modules(layout: ModelLayout) -> set[str]:
    return {layer.module for layer in layout.layers}


def reasons(layout: ModelLayout) -> dict[str, str]:
    return {k.module: k.reason for k in layout.kept}


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj"], 2), (["self_attn"], 8), (["layers.0"], 7), (["*.[qv]_proj", "up_proj"], 6)],
)
def test_targets_narrow_the_linears_of_the_blocks(targets, count):
    layout = discover.describe_model(zoo.build("llama"), targets=targets)
    assert len(layout.layers) == count
    assert list(reasons(layout).values()).count("not a target") == 14 - count


def test_a_bare_name_means_the_blocks_even_where_the_pooler_has_it_too():
    layout = discover.describe_model(zoo.build("bert"), targets=["dense"])
    assert len(layout.layers) == 6
    assert reasons(layout)["bert.pooler.dense"] == "pooler"


@pytest.mark.parametrize(
    ("name", "target", "module"),
    [
        ("bert", "pooler", "bert.pooler.dense"),
        ("opt-projected", "project_in", "model.decoder.project_in"),
        ("llava", "linear_2", "model.multi_modal_projector.linear_2"),
    ],
)
def test_a_layer_outside_the_blocks_can_be_named(name, target, module):
    layout = discover.describe_model(zoo.build(name), targets=[target])
    assert modules(layout) == {module}
    assert layout.layers[0].depth is None


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("llama", "lm_head", "output head"),
        ("llama-tied", "lm_head", "tied to the embedding"),
        ("bert", "classifier", "classifier"),
        ("llama", "embed_tokens", "Set embeddings"),
        ("mixtral", "experts", "expert tensors"),
    ],
)
def test_a_target_that_is_never_quantized_is_refused(name, target, reason):
    with pytest.raises(ValueError, match=reason):
        discover.describe_model(zoo.build(name), targets=[target])


def test_skip_keeps_layers_and_wins_over_targets():
    model = zoo.build("llama")
    layout = discover.describe_model(model, skip=["*.down_proj", "layers.1.self_attn", "lm_head"])
    assert len(layout.layers) == 14 - 2 - 4
    assert reasons(layout)["model.layers.0.mlp.down_proj"] == "skipped"
    assert reasons(layout)["lm_head"] == "output head"
    both = discover.describe_model(model, targets=["self_attn"], skip=["q_proj"])
    assert len(both.layers) == 6


def test_every_pattern_without_a_match_is_named_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'q_prj'.*mean 'q_proj'.*'mpl'.*mean 'mlp'"):
        discover.describe_model(zoo.build("llama"), targets=["q_prj"], skip=["mpl"])


def test_nothing_left_to_quantize_is_refused():
    with pytest.raises(discover.SourceError, match="nothing to quantize"):
        discover.describe_model(zoo.build("llama"), skip=["layers"])
    with pytest.raises(discover.SourceError, match="no linear layers at all"):
        discover.describe_model(nn.LayerNorm(3))


# --- embeddings


def test_embeddings_on_request_but_not_tables_that_no_adapter_can_reach():
    layout = discover.describe_model(zoo.build("deberta-v3"), embeddings=True)
    found = [layer for layer in layout.layers if layer.kind == "embedding"]
    assert [(x.module, x.shape, x.depth) for x in found] == [
        ("deberta.embeddings.word_embeddings", (zoo.VOCAB, zoo.WIDTH), None)
    ]
    # transformers reads this table's weight without calling it: PEFT's adapter would do nothing.
    assert reasons(layout)["deberta.encoder.rel_embeddings"] == "table read without a call"


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("bert", "bert.embeddings.token_type_embeddings"),
        ("mpnet", "mpnet.encoder.relative_attention_bias"),
    ],
)
def test_small_tables_stay_even_on_request(name, small):
    layout = discover.describe_model(zoo.build(name), embeddings=True)
    assert any(layer.module.endswith("word_embeddings") for layer in layout.layers)
    assert reasons(layout)[small] == "small table"


def test_embeddings_that_scale_their_output_are_not_plain_ones():
    layout = discover.describe_model(zoo.build_base("gemma3"), embeddings=True)
    assert reasons(layout)["embed_tokens"] == "unsupported layer"


@pytest.mark.parametrize("name", ["llama-tied", "bert-masked", "gpt2", "t5"])
def test_embeddings_that_share_their_weight_are_refused(name):
    with pytest.raises(ValueError, match="Pack the two without one"):
        discover.describe_model(zoo.build(name), embeddings=True)


def test_targets_and_embeddings_are_independent_and_skip_applies_to_both():
    model = zoo.build("bert")
    layout = discover.describe_model(model, targets=["query"], embeddings=True)
    assert [x.kind for x in layout.layers].count("embedding") == 2
    layout = discover.describe_model(model, skip=["word_embeddings"], embeddings=True)
    assert [x.kind for x in layout.layers].count("embedding") == 1
    layout = discover.describe_model(model, targets=["word_embeddings"], embeddings=True)
    assert {x.kind for x in layout.layers} == {"embedding"}


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("llama", ()),
        ("llama-tied", ("lm_head",)),
        ("t5", ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    ],
)
def test_tied_modules_are_listed(name, tied, tmp_path):
    assert set(discover.describe_model(zoo.build(name)).tied) == set(tied)
    assert set(describe(saved(name, tmp_path)).tied) == set(tied)


def test_linears_that_share_a_weight_are_not_packed_twice():
    model = zoo.build("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    layout = discover.describe_model(model)
    assert len(layout.layers) == 12
    assert {r for m, r in reasons(layout).items() if "up_proj" in m} == {"unsupported layer"}
    assert "model.layers.1.mlp.up_proj" in layout.tied


# --- checkpoints that do not fit


def test_missing_tensors_are_listed_at_once_with_the_nearest_name(tmp_path):
    saved("llama", tmp_path)
    tensors = rename_tensors(tmp_path, lambda n: n.replace("q_proj", "q_prj"))
    with pytest.raises(ValueError, match=r"(?s)2 of 14.*layers\.0.*q_prj.*layers\.1.*q_prj"):
        discover.describe_folder(tmp_path, tensors)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    saved("llama", tmp_path)
    tensors = shapes(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"] = [zoo.WIDTH, zoo.ODD]
    with pytest.raises(
        ValueError, match=r"1\.mlp\.up_proj\.weight: shape \(48, 75\), expected \(75"
    ):
        discover.describe_folder(tmp_path, tensors)


def test_a_long_list_of_problems_is_cut(tmp_path):
    saved("bart", tmp_path)
    with pytest.raises(ValueError, match="and 12 more"):
        discover.describe_folder(tmp_path, {"something": [1]})


def test_weights_that_the_loader_converts_are_kept(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    found = tensor_names.find_tensors(zoo.build("llama"), shapes(tmp_path))
    converted = {n for n in found.sources if n.endswith("v_proj.weight")}
    answer = tensor_names.TensorNames(found.sources, frozenset(converted))
    monkeypatch.setattr(discover, "find_tensors", lambda model, tensors: answer)
    layout = describe(tmp_path)
    assert len(layout.layers) == 12
    assert reasons(layout)["model.layers.0.self_attn.v_proj"] == "unsupported layer"


def test_one_to_many_conversions_of_the_loader_are_recognized(tmp_path):
    # transformers splits this family's experts; every fused parameter is known as converted.
    saved("mixtral", tmp_path)
    model = zoo.build("mixtral")
    found = tensor_names.find_tensors(model, shapes(tmp_path))
    fused = {n for n, _ in model.named_parameters() if ".experts." in n}
    assert fused == set(found.converted)
    assert fused.isdisjoint(found.sources)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "no such"}],
)
def test_a_config_that_makes_no_model_is_refused(change, tmp_path):
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(discover.SourceError, match=r"config\.json"):
        describe(tmp_path)


# --- loaded models and single layers


def test_a_plain_module_without_blocks_is_described_too():
    layout = discover.describe_model(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert [(x.module, x.tensor, x.depth) for x in layout.layers] == [
        ("0", "0.weight", None),
        ("2", "2.weight", None),
    ]
    assert (layout.blocks, layout.task_type, layout.model_type) == (0, None, "")


def test_models_with_adapters_or_packed_weights_are_refused():
    model = zoo.build("llama")
    model.config.quantization_config = {"quant_method": "loftq"}
    with pytest.raises(discover.SourceError, match="already quantized"):
        discover.describe_model(model)
    model = zoo.build("llama")
    model.peft_config = {}
    with pytest.raises(discover.SourceError, match="Merge them first"):
        discover.describe_model(model)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Written(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(3, 2), "linear"),
        (Written(3, 2), "linear"),
        (Doubled(3, 2), None),
        (Conv1D(2, 3), "conv1d"),
        (nn.Embedding(4, 2), "embedding"),
        (nn.Embedding(4, 2, max_norm=1.0), None),
        (nn.Conv1d(2, 2, 1), None),
        (nn.LayerNorm(4), None),
    ],
)
def test_quantizable_goes_by_what_a_layer_computes(module, kind):
    assert discover.quantizable(module) == kind


def test_linears_that_attention_uses_without_a_call_are_kept():
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.TransformerEncoderLayer(8, 2, dim_feedforward=16) for _ in range(2)
    )
    layout = discover.describe_model(model)
    assert modules(layout) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert reasons(layout)["layers.0.self_attn.out_proj"] == "unsupported layer"
    assert reasons(layout)["layers.0.self_attn.in_proj_weight"] == "unsupported layer"


def test_lists_side_by_side_share_their_depth():
    model = nn.Module()
    model.attentions = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
    model.ffns = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
    anatomy = structure.examine(model)
    assert anatomy.depth == 3
    assert anatomy.blocks["ffns.1"] == anatomy.blocks["attentions.1"] == 1


def test_the_papers_ratio_from_the_model_itself():
    config = DebertaV2Config(
        **{**zoo.ZOO["deberta-v3"].config().to_dict(), "vocab_size": 128100, "hidden_size": 768},
    )
    config.intermediate_size, config.num_hidden_layers, config.num_attention_heads = 3072, 12, 12
    with torch.device("meta"):
        model = DebertaV2Model(config)
    layout = discover.describe_model(model)
    formats = {layer.module: parse_format("uniform2") for layer in layout.layers}
    ratio = paper_ratio(layout.layers, formats, 16)
    assert 100 * ratio.compression == pytest.approx(15.625, abs=0.001)
    assert 100 * ratio.trainable == pytest.approx(3.125, abs=0.001)
