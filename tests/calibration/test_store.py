from pathlib import Path

import pytest
import torch

from loftq.calibration import (
    Accumulator,
    InputStatistics,
    StatisticsStore,
    default_folder,
    statistics_fingerprint,
)


def inputs(tokens=50, width=7, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def counted(kind: str, *chunks: torch.Tensor) -> InputStatistics:
    total = Accumulator(chunks[0].shape[1], kind, torch.device("cpu"))
    for chunk in chunks:
        total.add(chunk)
    return total.result()


def test_statistics_are_means_over_tokens():
    x = inputs()
    found = counted("gram", x[:20], x[20:])
    double = x.double()
    assert found.tokens == 50
    assert torch.allclose(found.gram.double(), double.T @ double / 50, atol=1e-6)
    assert torch.allclose(found.mean_square, double.square().mean(0), rtol=1e-6)
    means = torch.stack([double[:20].abs().mean(0), double[20:].abs().mean(0)])
    assert torch.allclose(found.largest_mean, means.amax(0), rtol=1e-6)


def test_the_diagonal_alone_is_the_same_number():
    x = inputs()
    assert torch.equal(counted("diagonal", x).mean_square, counted("gram", x).mean_square)
    assert counted("diagonal", x).gram is None


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    x = inputs()
    broken = x.clone()
    broken[3, 2], broken[7, 0] = torch.inf, torch.nan
    kept = [i for i in range(50) if i not in (3, 7)]
    found, clean = counted("gram", broken), counted("gram", x[kept])
    assert (found.tokens, found.dropped) == (48, 2)
    assert torch.equal(found.gram, clean.gram)


def test_no_finite_token_is_an_error():
    with pytest.raises(ValueError, match="no finite input among 5 tokens"):
        counted("gram", torch.full((5, 3), torch.nan))


def test_a_block_is_read_back_to_the_bit(tmp_path: Path):
    store = StatisticsStore(tmp_path, "abc")
    gram, diagonal = counted("gram", inputs()), counted("diagonal", inputs(width=3))
    q, k = "model.layers.0.q", "model.layers.0.k"
    store.write("model.layers.0", {q: gram}, {q: q, k: q})
    store.write("", {"pooler": diagonal}, {"pooler": "pooler"})
    for layer in (q, k):
        found = store.read(layer, "gram")
        assert torch.equal(found.gram, gram.gram)
        assert torch.equal(found.mean_square, gram.mean_square)
        assert torch.equal(found.largest_mean, gram.largest_mean)
        assert found.tokens == 50
    assert store.read(q, "diagonal").gram is None
    assert torch.equal(store.read("pooler", "diagonal").mean_square, diagonal.mean_square)


def test_what_is_there_is_known_by_layer_and_kind(tmp_path: Path):
    store = StatisticsStore(tmp_path, "abc")
    store.write("b", {"q": counted("diagonal", inputs())}, {"q": "q"})
    assert store.has("b", ["q"], "diagonal")
    assert not store.has("b", ["q"], "gram")
    assert not store.has("b", ["q", "o"], "diagonal")
    assert not store.has("c", [], "diagonal")
    assert not StatisticsStore(tmp_path, "other").has("b", ["q"], "diagonal")
    with pytest.raises(ValueError, match=r'o: no diagonal statistics .* skip=\["o"\]'):
        store.read("o", "diagonal")


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path: Path):
    store = StatisticsStore(tmp_path, "abc")
    store.folder.mkdir()
    (store.folder / "b.safetensors.partial").write_bytes(b"half")
    assert not store.has("b", ["q"], "diagonal")


def test_the_fingerprint_covers_weights_tokens_and_kind_of_device():
    base = {"source": "s", "tokens": "t", "device": "cuda:0"}
    name = statistics_fingerprint(**base)
    assert name == statistics_fingerprint(**{**base, "device": "cuda:1"})
    for key in base:
        assert name != statistics_fingerprint(**{**base, key: "cpu"})


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "statistics"


def test_padding_does_not_count():
    x = inputs(12).view(3, 4, -1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    total = Accumulator(x.shape[-1], "gram", torch.device("cpu"))
    total.add(torch.where(mask[..., None], x, torch.nan), mask)
    found, alone = total.result(), counted("gram", x[0], x[1, :2])
    assert found.tokens == 6
    assert found.dropped == 0
    assert torch.allclose(found.gram, alone.gram)
    assert torch.equal(found.largest_mean, alone.largest_mean)


def test_inputs_whose_squares_overflow_are_an_error():
    with pytest.raises(ValueError, match=r"squares of inputs around 1e\+20 overflow float32"):
        counted("gram", torch.full((5, 3), 1e20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gram_on_the_gpu_is_that_of_the_inputs(dtype: torch.dtype):
    x = torch.randn(4, 512, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = Accumulator(384, "gram", torch.device("cuda"))
    torch.set_float32_matmul_precision("medium")
    try:
        total.add(x.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    double = x.double().flatten(0, 1)
    wanted = double.T @ double / len(double)
    assert (total.result().gram.cpu().double() - wanted).abs().max() < 2e-6 * wanted.abs().max()
