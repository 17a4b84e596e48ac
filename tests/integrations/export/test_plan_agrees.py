"""What a plan says about engines is what export does: for formats, shapes and kinds at random."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq.checkpoint.export import LAYOUTS, NAMES, Layout, Packed, cannot_read
from loftq.formats import parse_format
from loftq.integrations.export import ENGINES, EXPORTS
from loftq.integrations.export.run import _choose, obstacle
from loftq.integrations.export.source import ExportError, ExportSource
from loftq.pipeline.config import ENGINE_FORMATS, QuantizeConfig
from loftq.pipeline.layout import KeptInfo, LayerInfo, ModelLayout
from loftq.pipeline.plan import Plan, PlannedLayer
from loftq.pipeline.serving import Serving, where_served

FORMATS = (
    "nf4-g64-dq", "nf4-g64-f32", "nf4-g128-dq", "nf4-g32-dq", "nf2-g64-dq", "nf4-g64-f16",
    "snf4-g64-dq", "sint4-g64-f16", "sint4-g64-bf16", "sint4-g32-f16", "sint2-channel-f16",
    "sint8-g128-f16", "sint3-g16-f16", "int4-g64-f16", "iq4nl-g32-f16", "sint8-g32-f16",
    "nf4-g64-dq-h16", "sint4-g32-f16-h16",
)  # fmt: skip
NAMES_OF_LAYERS = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj")
layers = st.lists(
    st.tuples(
        st.sampled_from(NAMES_OF_LAYERS),
        st.sampled_from(FORMATS),
        st.sampled_from([(64, 128), (64, 256), (40, 128), (64, 80), (1, 64)]),
        st.sampled_from(["linear"] * 6 + ["conv1d", "embedding"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda row: row[0],
)
"""(name, format, shape, kind, whether it stays dense) of the layers of one block."""
architectures = st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"])


def plan_and_source(rows: list, architecture: str) -> tuple[Plan, ExportSource]:
    """The same model before it is quantized and after."""
    packed = [row for row in rows if not row[4]] or rows
    kept = [row[0] for row in rows if row not in packed]
    planned = tuple(
        PlannedLayer(
            info=LayerInfo(module=f"b.0.{name}", tensor=name, shape=shape, kind=kind),
            spec=parse_format(format_),
            scale_fit="absmax",
            seed=0,
            rank=8,
        )
        for name, format_, shape, kind, _ in packed
    )  # fmt: skip
    plan = Plan(
        config=QuantizeConfig(rank=8),
        layout=ModelLayout(
            model_type="x",
            architecture=architecture,
            layers=(),
            kept=tuple(KeptInfo(module=f"b.0.{n}", reason="skip", parameters=1) for n in kept),
        ),
        layers=planned,
        batches=(),
        copied=(),
        shards=(),
        source_fingerprint="",
        source_bytes=0,
        device="cpu",
    )
    source = ExportSource(
        path=Path("OUT"),
        folder=Path("OUT"),
        adapter=None,  # type: ignore[arg-type]
        start=None,  # type: ignore[arg-type]
        record={"source": {"name": "org/model"}},
        config={"architectures": [architecture]},
        quantization={"modules_to_not_convert": [f"b.0.{n}" for n in kept]},
        weights=tuple(
            Packed(
                module=f"b.0.{name}", stem=f"b.0.{name}", spec=parse_format(format_), shape=shape,
                kind=kind,
            )
            for name, format_, shape, kind, _ in packed
        ),
        backbone=None,  # type: ignore[arg-type]
    )  # fmt: skip
    return plan, source


def place(plan: Plan, layout: Layout) -> Serving:
    """What the plan says of a layout."""
    return next(found for found in where_served(plan) if found.engine == layout.engine)


@settings(max_examples=300, deadline=None)
@given(layers, architectures)
def test_plan_and_export_agree(rows: list, architecture: str) -> None:
    plan, source = plan_and_source(rows, architecture)
    for layout in LAYOUTS:
        said, refused = place(plan, layout), obstacle(source, layout)
        unread = [cannot_read(k, layout, source.weights, source.kept) for k in layout.readers]
        assert said.exact == (not refused and not all(unread))
        if refused:
            assert said.note == refused
        if said.exact:
            assert _choose(source, (layout.name,), None).name == layout.name
        else:
            with pytest.raises(ExportError):
                _choose(source, (layout.name,), None)
        for engine in layout.readers:
            try:
                chosen = _choose(source, (layout.name,), engine)
            except ExportError:
                assert not said.exact or f"not by {NAMES[engine]}" in said.note
            else:
                assert chosen.name == layout.name
                assert NAMES[engine] in said.note.split("not by")[0]


@settings(max_examples=100, deadline=None)
@given(layers, architectures, st.sampled_from(sorted(ENGINES)))
def test_an_engine_is_served_when_one_of_its_layouts_is(
    rows: list, architecture: str, engine: str
) -> None:
    plan, source = plan_and_source(rows, architecture)
    said = [place(plan, EXPORTS[name].layout) for name in ENGINES[engine]]  # type: ignore[arg-type]
    readable = [
        found for found in said if found.exact and f"not by {NAMES[engine]}" not in found.note
    ]
    if readable:
        assert f"--to {_choose(source, ENGINES[engine], engine).name};" in readable[0].note
    else:
        with pytest.raises(ExportError, match=f"again with --for {engine}"):
            _choose(source, ENGINES[engine], engine)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_the_format_of_an_engine_goes_to_it(engine: str) -> None:
    rows = [(name, ENGINE_FORMATS[engine], (64, 128), "linear", False) for name in NAMES_OF_LAYERS]
    plan, source = plan_and_source(rows, "LlamaForCausalLM")
    chosen = _choose(source, ENGINES[engine], engine)
    assert chosen.layout is not None
    assert place(plan, chosen.layout).exact
