"""The identities that tie the methods together, and each row to its paper's equation.

All in float64 or exact solvers, on two 96 x 128 weights with correlated inputs (layer_problem.py).
"""

from dataclasses import replace

import pytest
import torch

from layer_problem import IN, OUT, effective, problem, statistics
from loftq.formats import parse_format
from loftq.lowrank import (
    CholeskyRoot,
    CovarianceRoot,
    DiagonalRoot,
    EigenRoot,
    ExactSolver,
    LeastSquaresSolver,
    Metric,
    WhitenedSolver,
)
from loftq.methods import METHODS
from loftq.rounding import DampingError, Gptq, round_to_nearest
from loftq.rounding.damping import damped
from loftq.schedules import preserve, project
from loftq.schedules.preserve import best_split, beyond
from tolerances import FLOAT32_SOLVE, FLOAT64_SOLVE

RANK = 8
FEW_BITS = {"name": "int2-g64-dq", "fit": "mse"}


def white():
    """Statistics of uncorrelated inputs of variance 1."""
    eye = torch.eye(IN).expand(2, -1, -1).contiguous()
    return replace(statistics(), mean_square=torch.ones(2, IN, dtype=torch.float64), gram=eye)


def solved(name, case, **options):
    """By the named row with an exact SVD."""
    return METHODS[name].with_options(solver="exact", **options).solve(case)


def same(one, other, tolerance=FLOAT32_SOLVE):
    """Equal codes, and products that agree."""
    for i in range(len(one.records)):
        assert torch.equal(one.quantized[i].weight_packed, other.quantized[i].weight_packed)
        assert close(effective(one, 1.0, i), effective(other, 1.0, i), tolerance)


def close(a, b, tolerance):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def residual(case):
    return case.weights - round_to_nearest(case.weights, case.spec, fit=case.scale_fit)[1]


# The six of every table


@pytest.mark.parametrize("name", ["nf2-g64-dq", "int3-g32-f16"])
def test_gptq_with_an_identity_gram_is_rounding_to_nearest(name):
    W, spec = problem().weights, parse_format(name)
    rounded, values = Gptq(white().gram, spec, fit="mse", damping=0.01)(W)
    plain, expected = round_to_nearest(W, spec, fit="mse")
    assert torch.equal(rounded.codes, plain.codes)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("name", ["qera-approx", "qera-exact", "eora", "cloq-core"])
def test_white_inputs_give_loftqs_step(name):
    step = METHODS["loftq"].with_options(iterations=1, solver="exact").solve(problem())
    same(solved(name, problem(known=white())), step)


def test_every_square_root_of_the_gram_gives_one_correction():
    case = problem(known=statistics())
    E, H = residual(case), damped(case.statistics.gram, 1e-3)
    values, vectors = torch.linalg.eigh(H)
    S = (vectors * values.sqrt()[:, None]) @ vectors.mT  # the symmetric root
    U, s, Vt = torch.linalg.svd(E.double() @ S)
    truncated = (U[..., :RANK] * s[:, None, :RANK]) @ Vt[:, :RANK]
    symmetric = torch.linalg.solve(S, truncated, left=False)
    for root in (CholeskyRoot, EigenRoot):
        metric = Metric(root(case.statistics.gram, damping=1e-3))
        found = WhitenedSolver(ExactSolver(RANK), metric).solve(E).product()
        assert close(found, symmetric, FLOAT32_SOLVE)


@pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.iterations])
def test_full_rank_leaves_nothing(name):
    case = problem(rank=OUT, known=statistics())
    for record in METHODS[name].solve(case).records:
        assert record.errors[record.kept - 1] < 1e-4


def test_a_diagonal_gram_makes_the_approximation_exact():
    h = torch.rand(2, IN, generator=torch.Generator().manual_seed(2)) + 0.1
    known = replace(statistics(), mean_square=h.double(), gram=torch.diag_embed(h))
    case = problem(known=known)
    same(solved("qera-approx", case), solved("qera-exact", case))


@pytest.mark.parametrize(
    "root", [CholeskyRoot, EigenRoot, CovarianceRoot, DiagonalRoot], ids=lambda r: r.__name__
)
def test_the_closed_form_beats_a_thousand_perturbations(root):
    case = problem(n=1, known=statistics(1))
    H = case.statistics.gram
    metric = Metric(root(case.statistics.mean_square if root is DiagonalRoot else H, damping=1e-3))
    E, g = residual(case), torch.Generator().manual_seed(4)
    found = WhitenedSolver(ExactSolver(RANK), metric).solve(E)
    least = metric.norm(E - found.product())
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        B = found.B + size * found.B.std() * torch.randn(250, OUT, RANK, generator=g)
        A = found.A + size * found.A.std() * torch.randn(250, RANK, IN, generator=g)
        assert (metric.norm(E - B @ A) >= least).all()


# Each row and its paper


def test_eora_is_cloq_through_the_eigenspace():
    case = problem(known=statistics(), **FEW_BITS)
    damping = {"metric_damping": 1e-2}
    same(solved("eora", case, **damping), solved("cloq-core", case, **damping))


def test_least_squares_rounds_are_quailoras_equations():
    case = problem(known=statistics())
    E, metric = residual(case), Metric(CholeskyRoot(case.statistics.gram, damping=1e-4))
    H, E64 = metric.input.factor @ metric.input.factor.mT, E.double()
    A = ExactSolver(RANK).solve(E).A.double()
    for rounds in (1, 2, 3):
        B = torch.linalg.solve(A @ H @ A.mT, E64 @ H @ A.mT, left=False)
        A = torch.linalg.solve(B.mT @ B, B.mT @ E64)
        found = LeastSquaresSolver(ExactSolver(RANK), metric, rounds=rounds).solve(E)
        assert close(found.product(), B @ A, FLOAT32_SOLVE)


def test_least_squares_never_raise_the_error_and_end_at_qera_exact():
    case = problem(known=statistics())
    E, metric = residual(case), Metric(CholeskyRoot(case.statistics.gram, damping=1e-4))
    best = WhitenedSolver(ExactSolver(RANK), metric).solve(E).product()

    def error(rounds):
        found = LeastSquaresSolver(ExactSolver(RANK), metric, rounds=rounds).solve(E)
        return metric.norm(E - found.product()) / metric.norm(E - best)

    path = torch.stack([error(rounds) for rounds in (1, 2, 5, 20, 100, 1000)])
    assert (path.diff(dim=0) <= FLOAT32_SOLVE).all()
    assert (path[0] > 1.001).all()
    assert (path[3] < 1.01).all()  # the paper's 20 rounds
    assert (path[-1] - 1).abs().max() < FLOAT32_SOLVE


def test_projq_rounds_for_the_inputs_that_the_leading_errors_do_not_meet():
    """Its P-step on tokens: the Gram of X (I - P P^T), P the leading right vectors of E X."""
    g = torch.Generator().manual_seed(6)
    X = torch.randn(1, IN, IN, generator=g).double() @ torch.randn(1, IN, 400, generator=g).double()
    case = problem(n=1, **FEW_BITS)
    W, metric = case.weights, Metric(CholeskyRoot(X @ X.mT, damping=0.0))
    grams, residuals = [], []

    def quantize_under(gram):
        def quantize(target):
            rounded, values = Gptq(gram, case.spec, fit="mse", damping=0.01)(target)
            residuals.append((W - values).double())
            return rounded, values

        grams.append(gram)
        return quantize

    project(
        W,
        root=metric.input.factor,
        quantize_under=quantize_under,
        solver=WhitenedSolver(ExactSolver(RANK), metric),
        design=WhitenedSolver(ExactSolver(2 * RANK), metric),
        iterations=3,
        damping=0.0,
        norm=metric.norm,
        span="round",
    )
    assert close(grams[0], X @ X.mT, FLOAT64_SOLVE)
    for E, gram in zip(residuals[:3], grams[1:], strict=True):
        P = torch.linalg.svd(E @ X, full_matrices=False)[2][:, : 2 * RANK].mT
        rest = X - (X @ P) @ P.mT
        assert close(gram, rest @ rest.mT, FLOAT32_SOLVE)


def test_the_rank_that_projq_rounds_for_is_not_that_of_the_correction():
    case = problem(known=statistics(), **FEW_BITS)
    by_default, same_rank = solved("projq", case), solved("projq", case, design_rank=RANK)
    same(by_default, same_rank)
    wide = solved("projq", case, design_rank=3 * RANK)
    assert wide.lora_A.shape == by_default.lora_A.shape
    assert not torch.equal(wide.quantized[0].weight_packed, by_default.quantized[0].weight_packed)
    with pytest.raises(ValueError, match=rf"layer0: rank {OUT + 1} is outside 1\.\.{OUT}"):
        solved("projq", case, design_rank=OUT + 1)


def test_projq_is_ahead_of_gptq_with_the_correction_that_it_looks_ahead_to():
    case = problem(known=statistics(), **FEW_BITS)
    projq, cloq = solved("projq", case).records, solved("cloq-core", case).records
    assert all(p.output_error < c.output_error for p, c in zip(projq, cloq, strict=True))


def by_srr(case, preserved):
    metric = Metric(CholeskyRoot(case.statistics.gram, damping=1e-4))
    found = preserve(
        case.weights,
        metric=metric,
        quantize=lambda W: round_to_nearest(W, case.spec, fit=case.scale_fit),
        rank=case.rank,
        generator=torch.Generator().manual_seed(0),
        preserved=preserved,
    )
    return metric, found


def test_srr_that_preserves_nothing_is_qera_exact():
    case = problem(known=statistics())
    _, found = by_srr(case, 0)
    qera = solved("qera-exact", case)
    for i in range(2):
        total = found.rounded.decode()[i] + found.low_rank.product()[i]
        assert close(total, effective(qera, 1.0, i), FLOAT32_SOLVE)


def test_srr_that_preserves_with_its_whole_rank_rounds_what_is_left():
    case = problem(known=statistics())
    metric, found = by_srr(case, case.rank)
    leading = WhitenedSolver(ExactSolver(case.rank), metric).solve(case.weights).product()
    assert close(found.low_rank.product(), leading, FLOAT32_SOLVE)
    plain = round_to_nearest(case.weights - leading, case.spec, fit=case.scale_fit)[1]
    assert close(found.rounded.decode(), plain, 1e-3)


def test_srr_splits_where_both_tails_are_least():
    decaying = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    noise = torch.ones(2, 5)
    assert torch.allclose(beyond(decaying)[0], torch.tensor([16.0, 8, 4, 2, 1, 0]) / 16)
    # rho_k rho'_{2-k}: (1, 1/2, 1/4)(3/5, 4/5, 1) and (1, 4/5, 3/5)(3/5, 4/5, 1)
    assert best_split(decaying, noise, 2).tolist() == [2, 0]


def test_srr_records_its_split_and_the_error_of_what_is_stored():
    case = problem(known=statistics(), **FEW_BITS)
    solution = METHODS["srr"].solve(case)
    for record in solution.records:
        assert 0 < record.preserved < case.rank
        assert record.errors[0] == pytest.approx(record.output_error, rel=1e-3)
    assert METHODS["qera-exact"].solve(case).records[0].preserved is None


def test_corda_takes_the_leading_terms_of_w_c_and_rounds_the_rest():
    case = problem(known=statistics())
    solution = solved("corda", case)
    C = damped(case.statistics.gram, 0.01)
    U, S, Vt = torch.linalg.svd(case.weights.double() @ C)
    leading = torch.linalg.solve(C, (U[..., :RANK] * S[:, None, :RANK]) @ Vt[:, :RANK], left=False)
    for i in range(2):
        product = solution.lora_B[i] @ solution.lora_A[i]
        assert close(product, leading[i], FLOAT32_SOLVE)
        rest = (case.weights - torch.stack([product, product]))[i : i + 1]
        plain = round_to_nearest(rest, case.spec, fit=case.scale_fit)[1][0]
        assert close(solution.quantized[i].dequantize(), plain, FLOAT32_SOLVE)


def test_corda_with_white_inputs_is_qpissa():
    same(solved("corda", problem(known=white())), solved("qpissa", problem(), iterations=1))


def test_caldera_with_white_inputs_is_qpissa():
    options = {"iterations": 4}
    same(
        solved("caldera", problem(known=white()), **options), solved("qpissa", problem(), **options)
    )


def test_caldera_begins_with_the_correction_of_w_and_keeps_the_best_of_its_rounds():
    case = problem(known=statistics(), **FEW_BITS)
    metric = Metric(CholeskyRoot(case.statistics.gram, damping=1e-4))
    first = WhitenedSolver(ExactSolver(RANK), metric).solve(case.weights).product()
    gptq = Gptq(case.statistics.gram, case.spec, fit="mse", damping=0.01)
    error = metric.norm(case.weights - first - gptq(case.weights - first)[1])
    relative = (error / metric.norm(case.weights)).tolist()
    for record, expected in zip(solved("caldera", case).records, relative, strict=True):
        assert record.errors[0] == pytest.approx(expected, rel=1e-4)
        assert len(record.errors) == 20
        assert record.errors[record.kept - 1] == min(record.errors)


def test_the_eigenvalues_of_a_gram_are_damped_as_its_cholesky_factor_is():
    H = statistics().gram.clone()
    H[0] = 0.1
    H[0].diagonal().sub_(0.02)
    roots = [root(H, damping=1e-4) for root in (EigenRoot, CholeskyRoot)]
    assert torch.equal(roots[0].damping, roots[1].damping)
    assert roots[0].damping[0] > roots[0].damping[1]
    E = residual(problem())
    assert torch.allclose(*(Metric(root).norm(E) for root in roots), rtol=FLOAT64_SOLVE)
    with pytest.raises(DampingError, match="strict=false"):
        EigenRoot(H, damping=1e-4, strict=True)
