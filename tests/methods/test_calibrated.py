"""What ties the calibrated methods to their papers' equations and to each other."""

from dataclasses import replace

import pytest
import torch

from layer_problem import IN, OUT, effective, problem, statistics
from loftq.lowrank import CholeskyRoot, DiagonalRoot, ExactSolver, Metric, WhitenedSolver
from loftq.methods import METHODS, Method
from loftq.rounding import DampingError, Gptq, round_to_nearest
from loftq.transforms import magr
from tolerances import FLOAT32_SOLVE

NAMES = ("qera-approx", "qera-exact", "cloq-core", "fast")
EVERY = tuple(n for n, row in METHODS.items() if row.needs != "none" and row.iterations)
"""Calibrated methods that solve for a correction; the others leave all to a refinement."""
GRAM = tuple(name for name in EVERY if METHODS[name].needs == "gram")


def exactly(name):
    """The method with an exact SVD in place of the filter."""
    return METHODS[name].with_options(solver="exact")


def close(a, b, tolerance=FLOAT32_SOLVE):
    return (a - b).norm() <= tolerance * b.norm()


def output_error(case, solution, i=0):
    """From the definition, over the true Gram."""
    E = (case.weights[i] - effective(solution, case.scaling, i)).double()
    H, W = case.statistics.gram[i].double(), case.weights[i].double()
    return (((E @ H) * E).sum() / ((W @ H) * W).sum()).sqrt().item()


@pytest.mark.parametrize("name", EVERY)
def test_the_record_holds_the_output_error_of_what_is_stored(name):
    case = problem(2.0, known=statistics(), name="int2-g64-dq", fit="mse")
    solution = METHODS[name].solve(case)
    for i, record in enumerate(solution.records):
        assert record.output_error == pytest.approx(output_error(case, solution, i), rel=1e-5)
        assert record.output_error < record.plain_output_error
        assert record.tokens == 1000


@pytest.mark.parametrize("name", ["lqer", "qera-approx", "qera-exact"])
def test_after_plain_rounding_the_correction_is_the_papers_closed_form(name):
    case = problem(known=statistics())
    solution = exactly(name).solve(case)
    rounded, values = round_to_nearest(case.weights, case.spec, fit=case.scale_fit)
    gram, a = case.statistics.gram, case.statistics.largest_mean
    scale = a / (a.amin(1, keepdim=True) * a.amax(1, keepdim=True)).sqrt()
    root = {
        "lqer": DiagonalRoot(scale.square(), damping=1e-4),
        "qera-approx": DiagonalRoot(gram.diagonal(dim1=1, dim2=2), damping=1e-4),
        "qera-exact": CholeskyRoot(gram, damping=1e-4),
    }[name]
    best = WhitenedSolver(ExactSolver(8), Metric(root)).solve(case.weights - values)
    for i in range(2):
        assert torch.equal(solution.quantized[i].weight_packed, rounded.pack(i).weight_packed)
        assert close(solution.lora_B[i] @ solution.lora_A[i], best.product()[i])


@pytest.mark.parametrize("name", ["cloq", "cloq-core"])
def test_cloq_is_qera_exact_after_gptq_of_the_smoothed_weight(name):
    case = problem(known=statistics(), name="int2-g64-dq", fit="mse")
    solution = exactly(name).solve(case)
    gram, V = case.statistics.gram, case.weights
    if name == "cloq":
        V = magr(V, gram, group_size=64)
    rounded, values = Gptq(gram, case.spec, fit="mse", damping=0.01)(V)
    root = CholeskyRoot(gram, damping=0.01)
    best = WhitenedSolver(ExactSolver(8), Metric(root)).solve(case.weights - values)
    for i in range(2):
        assert torch.equal(solution.quantized[i].weight_packed, rounded.pack(i).weight_packed)
        assert close(solution.lora_B[i] @ solution.lora_A[i], best.product()[i])


def test_with_uncorrelated_inputs_approx_is_exact():
    h = torch.rand(2, IN, generator=torch.Generator().manual_seed(2)) + 0.1
    known = replace(statistics(), mean_square=h.double(), gram=torch.diag_embed(h))
    approx, exact = (exactly(n).solve(problem(known=known)) for n in NAMES[:2])
    for i in range(2):
        assert close(effective(approx, 1.0, i), effective(exact, 1.0, i))


@pytest.mark.parametrize("name", NAMES[:3])
def test_with_white_inputs_each_is_one_step_of_loftq(name):
    white = replace(
        statistics(),
        mean_square=torch.ones(2, IN, dtype=torch.float64),
        gram=torch.eye(IN).expand(2, -1, -1).contiguous(),
    )
    found = exactly(name).solve(problem(known=white))
    loftq = METHODS["loftq"].with_options(iterations=1, solver="exact").solve(problem())
    for i in range(2):
        assert torch.equal(found.quantized[i].weight_packed, loftq.quantized[i].weight_packed)
        assert close(effective(found, 1.0, i), effective(loftq, 1.0, i))


@pytest.mark.parametrize("name", EVERY)
def test_full_rank_leaves_nothing(name):
    known = replace(statistics(), drift=torch.zeros(2, IN, IN))
    case = problem(rank=OUT, known=known)
    solution = METHODS[name].solve(case)
    assert output_error(case, solution) < 1e-4


@pytest.mark.parametrize("name", ["lqer", *NAMES[:3]])
def test_the_filter_ends_where_an_exact_svd_does(name):
    case = problem(known=statistics(), name="int2-g64-dq", fit="mse")
    filtered, exact = METHODS[name].solve(case), exactly(name).solve(case)
    for one, other in zip(filtered.records, exact.records, strict=True):
        assert one.errors[0] == pytest.approx(other.errors[0], rel=1e-5)


def test_fast_is_ahead_of_every_reproduction_and_cloq_of_rounding_first():
    errors = {}
    for name in ("loftq", *NAMES):
        case = problem(rank=16, known=statistics(), name="int2-g64-dq", fit="mse")
        errors[name] = output_error(case, METHODS[name].solve(case))
    assert errors["fast"] < 0.9 * min(v for k, v in errors.items() if k != "fast")
    assert errors["qera-exact"] < errors["qera-approx"] < errors["loftq"]


def test_every_step_of_fast_is_recorded_and_the_best_is_kept():
    case = problem(known=statistics(), name="int2-g64-dq", fit="mse")
    for record in METHODS["fast"].solve(case).records:
        assert len(record.errors) == METHODS["fast"].iterations
        assert record.errors[record.kept - 1] == min(record.errors)


@pytest.mark.parametrize("name", EVERY)
def test_statistics_that_are_missing_are_asked_for(name):
    with pytest.raises(ValueError, match=r"layer0: this method needs .* \(loftq, qlora\)"):
        METHODS[name].solve(problem())


def indefinite() -> torch.Tensor:
    H = 0.1 * torch.ones(2, IN, IN)
    H[1] = statistics().gram[1]
    H[0].diagonal().sub_(0.02)
    return H


@pytest.mark.parametrize("name", GRAM)
def test_more_damping_than_asked_for_is_recorded_for_that_layer_alone(name):
    case = problem(known=replace(statistics(), gram=indefinite()), name="int2-g64-f32", fit="mse")
    failed, fine = METHODS[name].solve(case).records
    assert any("damping of the metric raised from" in note for note in failed.notes)
    assert failed.damping > METHODS[name].damping
    assert fine.notes == ()
    with pytest.raises(DampingError, match="strict=false"):
        METHODS[name].solve(replace(case, strict=True))


@pytest.mark.parametrize("name", GRAM)
def test_few_or_broken_tokens_stand_in_the_record(name):
    known = replace(statistics(tokens=40), tokens=(40, 1000), dropped=(0, 3))
    case = problem(known=known, name="int2-g64-dq", fit="mse")
    notes = [record.notes for record in METHODS[name].solve(case).records]
    assert notes[0] == (f"40 tokens for a Gram of {IN}: damping fills the rest",)
    assert notes[1] == ("3 calibration tokens left out: inputs not finite",)
    with pytest.raises(ValueError, match="layer0: 40 tokens for a Gram of 128"):
        METHODS[name].solve(replace(case, strict=True))


def test_a_row_must_declare_what_its_parts_need():
    with pytest.raises(AssertionError, match="mine: needs"):
        Method(name="mine", paper="", summary="", needs="diagonal", metric="gram")
    with pytest.raises(AssertionError, match="mine: magic is none of"):
        Method(name="mine", paper="", summary="", rounding="magic")


def test_fast_takes_a_grid_with_one_scale_for_the_whole_tensor():
    case = problem(known=statistics(), name="uniform2", fit="absmax")
    solution = METHODS["fast"].solve(case)
    for i, record in enumerate(solution.records):
        assert record.output_error < record.plain_output_error
        assert output_error(case, solution, i) == pytest.approx(record.output_error, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format_name", ["nf2-g64-dq", "int2-g64-dq", "int3-g32-f16", "nf4-g64-f32"]
)
def test_fast_on_the_gpu_is_as_good_as_on_the_cpu(format_name):
    case = problem(known=statistics(), name=format_name, fit="mse")
    known = case.statistics
    moved = {name: getattr(known, name).cuda() for name in ("mean_square", "largest_mean", "gram")}
    there = replace(case, weights=case.weights.cuda(), statistics=replace(known, **moved))
    here = [record.output_error for record in METHODS["fast"].solve(case).records]
    found = [record.output_error for record in METHODS["fast"].solve(there).records]
    assert found == pytest.approx(here, rel=0.02)  # other last bits choose other codes
