import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loftq.lab import demo, rows
from loftq.lab.demo import run_demo
from loftq.lab.show import perplexity_text

NAMES = ["reference", "4bit-loftq", "2bit-qlora", "2bit-loftq-paper", "2bit-loftq"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random Llama with a byte-level tokenizer, stored as float32."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(alphabet), hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """(result, printed text, work folder) of one run of the whole demo."""
    work = tmp_path_factory.mktemp("demo") / "work"
    out = io.StringIO()
    result = run_demo(model=str(tiny), steps=2, work=work, console=Console(file=out, width=120))
    return result, out.getvalue(), work


def test_the_table_has_every_row_and_column(ran):
    result, printed, _ = ran
    assert [row.name for row in result.rows] == NAMES
    for row in result.rows:
        assert row.label in printed
        assert math.isfinite(row.perplexity_before)
        assert math.isfinite(row.perplexity_after)
        assert row.sentence.startswith(rows.PROMPT)
    for heading in ("adapter", "bits per", "perplexity", "before", "after 2"):
        assert heading in printed


def test_the_table_says_which_text_how_many_windows_and_that_it_carries_no_claim(ran):
    result, printed, _ = ran
    assert "demo_text.txt" in printed
    assert f"{result.text['windows']} windows of {result.text['context']} tokens" in printed
    assert "no claim" in printed


def test_bits_and_bytes_are_those_of_the_files(ran, tiny):
    result, _, work = ran
    reference, *packed = result.rows
    assert reference.bits_per_weight == 32.0
    assert reference.model_bytes == tensor_bytes(tiny)
    for row in packed:
        assert row.model_bytes == tensor_bytes(work / row.name)
        assert row.adapter_bytes == tensor_bytes(work / f"{row.name}-adapter")
    assert [row.bits_per_weight > 4 for row in packed] == [True, False, False, False]


def tensor_bytes(folder: Path) -> int:
    """Data bytes of the safetensors files in a folder, headers left out."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def test_tuning_lowers_the_perplexity_of_every_row(ran):
    assert all(row.perplexity_after < row.perplexity_before for row in ran[0].rows)


def test_a_tuned_adapter_loads_on_its_packed_backbone_with_the_same_perplexity(ran, tiny):
    import loftq
    from loftq.eval.perplexity import perplexity

    result, _, work = ran
    row = result.rows[-1]
    folder = work / row.name
    model = loftq.load(folder, adapter=work / f"{row.name}-adapter", dtype=torch.float32)
    bench = demo._bench(tiny, work, 2)
    found = perplexity(model, bench.evaluation, context=bench.context, windows=rows.EVAL_WINDOWS)
    assert found.perplexity == pytest.approx(row.perplexity_after, rel=1e-5)


def test_json_is_the_only_output_and_a_second_run_replaces_the_first(ran, tiny):
    result, _, work = ran
    out = io.StringIO()
    run_demo(model=str(tiny), steps=2, work=work, as_json=True, console=Console(file=out))
    values = json.loads(out.getvalue())
    assert [row["name"] for row in values["rows"]] == NAMES
    for row, first in zip(values["rows"], result.rows, strict=True):
        assert row["total_bytes"] == first.total_bytes
        assert row["perplexity_after"] == pytest.approx(first.perplexity_after, rel=1e-5)
    assert values["note"].endswith("no claim.")
    assert values["text"]["windows"] == rows.EVAL_WINDOWS


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    hf.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="not a causal language model"):
        run_demo(model=str(tmp_path / "bert"), work=tmp_path / "work")


def test_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="steps=0"):
        run_demo(steps=0, work=tmp_path)


def test_perplexities_are_short_and_a_diverged_row_says_so():
    assert [perplexity_text(v) for v in (26.35, 1987.0, 1.9759e9, math.inf, math.nan)] == [
        "26.4", "1,987", "2e9", "inf", "diverged",
    ]  # fmt: skip
