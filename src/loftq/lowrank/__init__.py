"""The best rank-r correction of a residual, exact or by filtered subspace iteration."""

from loftq.lowrank.chebyshev import ChebyshevSolver
from loftq.lowrank.solve import SOLVERS, ExactSolver, LowRank, Solver, best_correction, make_solver

__all__ = [
    "SOLVERS",
    "ChebyshevSolver",
    "ExactSolver",
    "LowRank",
    "Solver",
    "best_correction",
    "make_solver",
]
