"""A stored model in the class of a task: the head, the start adapter on the same layers."""

from pathlib import Path

import pytest
import torch

import loftq
import zoo
from loftq.integrations.heads import HeadError, attach_fresh, attach_start, load_headed
from loftq.integrations.peft import LineageError

CLASSES = "AutoModelForSequenceClassification"
SPANS = "AutoModelForQuestionAnswering"
FAMILIES = ("bert", "roberta", "deberta-v3", "mpnet", "bart", "t5", "llama")
HEADS = {
    "bert": {"classifier", "bert.pooler"},
    "roberta": {"classifier"},
    "deberta-v3": {"pooler", "classifier"},
    "mpnet": {"classifier"},
    "bart": {"classification_head"},
    "t5": {"classification_head"},
    "llama": {"score"},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> (full-precision folder without a head of classes, its 2-bit output)."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        make = zoo.build if name in ("bart", "t5", "llama") else zoo.build_base
        zoo.save(make(name), folder / "model")
        loftq.quantize(folder / "model", folder / "out", bits=2, rank=4, device="cpu")
        found[name] = (folder / "model", folder / "out")
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_start_is_carried_to_the_class_of_the_task(
    name: str, packed: dict[str, tuple[Path, Path]]
) -> None:
    from safetensors.torch import load_file

    _, out = packed[name]
    headed = load_headed(out, CLASSES, new_head=True, seed=0, num_labels=3)
    assert set(headed.head) == HEADS[name]
    model = attach_start(headed, out / "init_adapter", CLASSES)
    stored = load_file(out / "init_adapter/adapter_model.safetensors")
    found = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    assert len(found) == len(stored)
    ours = sorted(float(value.double().norm()) for value in found.values())
    assert ours == pytest.approx(sorted(float(value.double().norm()) for value in stored.values()))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    loss = model(input_ids=_ids(name), labels=torch.tensor([0, 2])).loss
    loss.backward()
    heads = [n for n, p in model.named_parameters() if "modules_to_save" in n]
    assert heads
    assert all(model.get_parameter(n).grad is not None for n in heads if ".key" not in n)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_full_rank_gives_the_logits_of_the_original(
    name: str, packed: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = packed[name]
    out = tmp_path / "out"
    loftq.quantize(source, out, bits=4, rank=zoo.WIDTH, device="cpu")
    headed = load_headed(out, SPANS, new_head=True, seed=5)
    model = attach_start(headed, out / "init_adapter", SPANS).eval()
    original = load_headed(source, SPANS, new_head=True, seed=5).model.eval()
    ids = _ids(name)
    with torch.no_grad():
        found, wanted = model(input_ids=ids).start_logits, original(input_ids=ids).start_logits
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_fresh_lora_changes_nothing_yet(packed: dict[str, tuple[Path, Path]]) -> None:
    source, _ = packed["mpnet"]
    planned = loftq.plan(source, device="cpu")
    paths = [layer.info.module for layer in planned.layers]
    plain = load_headed(source, CLASSES, new_head=True, seed=3, num_labels=2).model.eval()
    headed = load_headed(source, CLASSES, new_head=True, seed=3, num_labels=2)
    model = attach_fresh(headed, paths, CLASSES, rank=2, alpha=2).eval()
    ids = _ids("mpnet")
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert len([n for n, _ in model.named_parameters() if "lora_A" in n]) == len(paths)


def test_the_head_follows_its_seed_and_a_head_of_other_classes_is_replaced(tmp_path: Path) -> None:
    zoo.save(zoo.build("mpnet"), tmp_path)  # with a head of two classes
    kept = load_headed(tmp_path, CLASSES, new_head=True, seed=0, num_labels=2)
    assert kept.new == ()
    first, again, other = (
        load_headed(tmp_path, CLASSES, new_head=True, seed=seed, num_labels=3) for seed in (0, 0, 1)
    )
    assert "classifier.out_proj.weight" in first.new
    weights = [h.model.classifier.out_proj.weight for h in (first, again, other)]
    assert weights[0].shape == (3, zoo.WIDTH)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("place", [0, 1])
def test_a_class_that_finds_no_weights_is_refused(
    place: int, packed: dict[str, tuple[Path, Path]]
) -> None:
    with pytest.raises(HeadError, match="LlamaForQuestionAnswering keeps its backbone under"):
        load_headed(packed["llama"][place], SPANS, new_head=True, seed=0)
    assert load_headed(packed["bert"][place], SPANS, new_head=True, seed=0).head


def test_what_does_not_fit_is_refused(packed: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    _, out = packed["bert"]
    _, other = packed["mpnet"]
    headed = load_headed(out, CLASSES, new_head=True, seed=0, num_labels=2)
    with pytest.raises(LineageError, match="belongs to backbone"):
        attach_start(headed, other / "init_adapter", CLASSES)
    with pytest.raises(HeadError, match="transformers has no AutoModelForSeq2SeqLM for bert"):
        load_headed(out, "AutoModelForSeq2SeqLM", new_head=False, seed=0)
    with pytest.raises(HeadError, match="which BertForSequenceClassification lacks"):
        attach_fresh(headed, ["encoder.layer.9.attention"], CLASSES, rank=2, alpha=2)
    zoo.save(zoo.build_base("llama"), tmp_path)
    with pytest.raises(HeadError, match=r"has no weights for lm_head.weight"):
        load_headed(tmp_path, "AutoModelForCausalLM", new_head=False, seed=0)


def _ids(name: str) -> torch.Tensor:
    ids = zoo.tokens()
    ids[:, -1] = 1 if name == "t5" else 2  # encoder-decoders classify at the end of the text
    return ids
