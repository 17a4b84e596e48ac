"""Several adapters in one pass against one after the other."""

import copy

import pytest
import torch
from torch import nn

from loftq.nn.members import MemberLinear, MemberModules, attach_members_, for_members
from packed_folder import tiny_llama

MEMBERS, RANK = 3, 4


def drawn(out_features: int, in_features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (members, rank, in), B (members, out, rank)."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(MEMBERS, RANK, in_features, generator=generator)
    return A / in_features**0.5, torch.randn(MEMBERS, out_features, RANK, generator=generator)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (4,)])
def test_a_layer_gives_each_member_its_own_correction(shape: tuple[int, ...]) -> None:
    base, (A, B) = nn.Linear(8, 6), drawn(6, 8, 0)
    layer = MemberLinear(base, A, B, scaling=0.5)
    x = torch.randn(MEMBERS * shape[0], *shape[1:], 8)
    rows = x.chunk(MEMBERS)
    expected = [base(row) + 0.5 * row @ A[m].T @ B[m].T for m, row in enumerate(rows)]
    assert torch.allclose(layer(x), torch.cat(expected), atol=1e-5)


def test_a_model_with_members_is_the_members_one_after_the_other() -> None:
    model = tiny_llama()
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    factors = {
        path: drawn(*model.get_submodule(path).weight.shape, seed)
        for seed, path in enumerate(paths)
    }
    heads = [{"weight": torch.randn(97, 48, generator=torch.Generator().manual_seed(m))}
             for m in range(MEMBERS)]  # fmt: skip
    inputs = {"input_ids": torch.randint(5, 97, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    singles = []
    for m in range(MEMBERS):
        single = copy.deepcopy(model)
        for path, (A, B) in factors.items():
            single.get_submodule(path).weight.data += 0.25 * B[m] @ A[m]
        single.lm_head.weight.data = heads[m]["weight"]
        singles.append(single(**inputs).logits)
    attach_members_(model, factors, {"lm_head": heads}, scaling=0.25)
    with torch.no_grad():
        together = model(**for_members(inputs, MEMBERS)).logits.view(MEMBERS, 2, 7, 97)
    assert torch.allclose(together, torch.stack(singles), atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_what_does_not_fit_is_refused() -> None:
    A, B = drawn(6, 8, 0)
    with pytest.raises(ValueError, match="expected \\(members, rank"):
        MemberLinear(nn.Linear(8, 6), A, B[:2], scaling=1.0)
    with pytest.raises(ValueError, match="7 rows cannot be dealt out to 3 members"):
        MemberModules([nn.Identity() for _ in range(3)])(torch.zeros(7, 2))
    with pytest.raises(ValueError, match="nothing: the model has no such module"):
        attach_members_(tiny_llama(), {"nothing": (A, B)}, {}, scaling=1.0)
