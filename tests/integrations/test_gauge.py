"""Starts in other factors: the same function, other gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loftq
import zoo
from loftq.integrations.gauge import WEIGHTS, random_orthogonal, rotate, rotated_start
from loftq.integrations.run_folder import backbone_and_adapter


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gauge")
    source = zoo.save(zoo.build("llama"), folder / "source")
    loftq.quantize(source, folder / "out", bits=2, rank=4, alpha=8, device="cpu")
    return folder / "out"


def test_an_orthogonal_matrix_is_one_and_has_no_preferred_direction() -> None:
    drawn = torch.stack([random_orthogonal(3, seed) for seed in range(2000)])
    assert torch.allclose(drawn @ drawn.mT, torch.eye(3, dtype=torch.float64).expand(2000, 3, 3))
    assert drawn.mean(0).abs().max() < 4 / 2000**0.5  # a QR without signs has a mean of 0.5
    assert drawn.var(0).sub(1 / 3).abs().max() < 0.05


def test_products_stay_and_factors_move(out: Path) -> None:
    before = load_file(out / "init_adapter" / WEIGHTS)
    after = rotate(before, seed=1)
    assert after.keys() == before.keys()
    names = [name for name in before if "lora_A" in name]
    assert names
    for name in names:
        other = name.replace("lora_A", "lora_B")
        product, rotated = before[other] @ before[name], after[other] @ after[name]
        assert torch.allclose(product, rotated, atol=1e-6 * float(product.abs().max()) + 1e-9)
        assert (before[name] - after[name]).norm() > 0.5 * before[name].norm()
        assert torch.isclose(before[name].norm(), after[name].norm())


def test_a_member_starts_as_the_model_and_learns_elsewhere(out: Path, tmp_path: Path) -> None:
    inputs = zoo.ZOO["llama"].inputs()
    losses, steps = [], []
    for seed in (0, 1):
        folder = rotated_start(out, tmp_path / str(seed), seed=seed)
        base, adapter = backbone_and_adapter(folder)
        model = loftq.load(base, adapter=adapter, trainable=True, dtype=torch.float32)
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss))
        steps.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    start = loftq.load(out, dtype=torch.float32)
    assert losses == pytest.approx([float(start(**inputs).loss)] * 2, rel=1e-5)
    name = next(name for name in steps[0] if "lora_A" in name)
    assert (steps[0][name] - steps[1][name]).norm() > 0.5 * steps[0][name].norm()


def test_a_folder_that_is_there_is_not_written_over(out: Path, tmp_path: Path) -> None:
    rotated_start(out, tmp_path / "member", seed=0)
    with pytest.raises(FileExistsError):
        rotated_start(out, tmp_path / "member", seed=1)
