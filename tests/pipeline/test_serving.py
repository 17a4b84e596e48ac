"""Which engines hold which formats without loss."""

import pytest

from loftq.formats import parse_format
from loftq.pipeline.config import ENGINE_FORMATS, QuantizeConfig
from loftq.pipeline.layout import LayerInfo, ModelLayout
from loftq.pipeline.plan import Plan, PlannedLayer
from loftq.pipeline.serving import max_lora_rank, where_served

OURS, BNB, GPTQ, COMPRESSED, GGUF = (
    "transformers + PEFT",
    "bitsandbytes NF4",
    "GPTQ",
    "compressed-tensors",
    "GGUF Q4_0 / IQ4_NL / Q8_0",
)


def planned(
    *formats: str,
    shape: tuple[int, int] = (128, 256),
    kind: str = "linear",
    rank: int = 16,
    architecture: str = "LlamaForCausalLM",
) -> Plan:
    """A plan of one layer per format, as far as serving looks at it."""
    layers = tuple(
        PlannedLayer(
            info=LayerInfo(module=f"blocks.{i}.up", tensor=f"{i}.weight", shape=shape, kind=kind),
            spec=parse_format(name),
            scale_fit="absmax",
            seed=0,
            rank=rank,
        )
        for i, name in enumerate(formats)
    )
    return Plan(
        config=QuantizeConfig(rank=rank),
        layout=ModelLayout(model_type="x", architecture=architecture, layers=()),
        layers=layers,
        batches=(),
        copied=(),
        shards=(),
        source_fingerprint="",
        source_bytes=0,
        device="cpu",
    )


def exact(plan: Plan) -> set[str]:
    return {place.engine for place in where_served(plan) if place.exact}


def note(plan: Plan, engine: str) -> str:
    return next(place.note for place in where_served(plan) if place.engine == engine)


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("nf4-g64-dq", {BNB}),
        ("nf4-g128-f32", {BNB}),
        ("nf4-g32-dq", set()),
        ("nf4-g64-f16", set()),
        ("snf4-g64-dq", set()),
        ("nf3-g64-dq", set()),
        ("sint4-g64-f16", {GPTQ, COMPRESSED}),
        ("sint2-channel-f16", {GPTQ, COMPRESSED}),
        ("sint4-g32-f16", {GPTQ, COMPRESSED, GGUF}),
        ("sint8-g128-bf16", {COMPRESSED}),
        ("sint8-g128-f32", set()),
        ("sint8-g32-f16", {GPTQ, COMPRESSED, GGUF}),
        ("sint4-g16-f16", set()),
        ("int4-g64-f16", set()),
        ("iq4nl-g32-f16", {GGUF}),
        ("iq4nl-g64-f16", set()),
        ("uniform4", set()),
    ],
)
def test_engines_of_a_format(name: str, engines: set[str]) -> None:
    assert exact(planned(name)) == {OURS, *engines}


@pytest.mark.parametrize(
    ("engine", "place"), [("transformers", BNB), ("vllm", GPTQ), ("llama.cpp", GGUF)]
)
def test_the_format_picked_for_an_engine_is_held_by_it(engine: str, place: str) -> None:
    assert place in exact(planned(ENGINE_FORMATS[engine]))


def test_partial_groups_fit_no_other_engine() -> None:
    for name in ("nf4-g64-dq", "sint4-g64-f16", "iq4nl-g32-f16"):
        plan = planned(name, shape=(64, 80))
        assert exact(plan) == {OURS}
    assert "80 columns are not whole groups of 64" in note(planned("nf4", shape=(64, 80)), BNB)


def test_gptq_needs_sizes_of_whole_words() -> None:
    plan = planned("sint4-channel-f16", shape=(100, 256))
    assert exact(plan) == {OURS, COMPRESSED}
    assert "multiples of 32" in note(plan, GPTQ)


def test_bitsandbytes_has_one_format_for_a_model() -> None:
    plan = planned("nf4-g64-dq", "nf4-g128-dq")
    assert exact(plan) == {OURS}
    assert "one format for the whole model" in note(plan, BNB)


def test_gguf_may_mix_its_types() -> None:
    assert GGUF in exact(planned("sint4-g32-f16", "iq4nl-g32-f16"))


def test_the_first_layer_that_does_not_fit_is_named() -> None:
    plan = planned("sint4-g64-f16", "nf4-g64-dq")
    assert note(plan, GPTQ).startswith("blocks.1.up (nf4-g64-dq): needs symmetric integers")


def test_embeddings_and_transposed_layers_fit_fewer() -> None:
    assert exact(planned("nf4-g64-dq", kind="embedding")) == {OURS}
    assert exact(planned("sint4-g32-f16", kind="conv1d")) == {OURS}


def test_gguf_is_written_for_the_architectures_that_it_is_translated_for() -> None:
    plan = planned("sint4-g32-f16", architecture="GPT2LMHeadModel")
    assert exact(plan) == {OURS, GPTQ, COMPRESSED}
    assert note(plan, GGUF).startswith("GPT2LMHeadModel: GGUF files are written for Llama")


def test_vllm_is_given_a_rank_limit_that_it_knows() -> None:
    assert "--max-lora-rank 32" in note(planned("sint4-g64-f16", rank=24), GPTQ)
    assert max_lora_rank(256) == "--max-lora-rank 256"
    assert max_lora_rank(257) == "--max-lora-rank 320"
    assert max_lora_rank(513) == ""
    assert "no adapter of this rank" in note(planned("sint4-g64-f16", rank=513), GPTQ)


def test_a_note_names_the_command_that_exports() -> None:
    assert note(planned("nf4-g64-dq"), BNB).startswith("loftq export --to bnb;")
