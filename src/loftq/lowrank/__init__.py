"""The best rank-r correction of a residual, exact or by filtered subspace iteration."""

from loftq.lowrank.chebyshev import ChebyshevSolver
from loftq.lowrank.least_squares import LeastSquaresSolver
from loftq.lowrank.metrics import (
    CholeskyRoot,
    CovarianceRoot,
    DiagonalRoot,
    EigenRoot,
    IdentityRoot,
    Metric,
    Root,
)
from loftq.lowrank.orthonormal import orthonormal
from loftq.lowrank.solve import SOLVERS, ExactSolver, LowRank, Solver, best_correction, make_solver
from loftq.lowrank.whitened import WhitenedSolver, evenly_split

__all__ = [
    "SOLVERS",
    "ChebyshevSolver",
    "CholeskyRoot",
    "CovarianceRoot",
    "DiagonalRoot",
    "EigenRoot",
    "ExactSolver",
    "IdentityRoot",
    "LeastSquaresSolver",
    "LowRank",
    "Metric",
    "Root",
    "Solver",
    "WhitenedSolver",
    "best_correction",
    "evenly_split",
    "make_solver",
    "orthonormal",
]
