from .._platform import chosen_platform
from ..solvers import AbstractSolver
from ._base import AbstractAdjoint, AbstractLinearAdjoint
from ._linear_solve import LinearSolveAdjoint
from ._one_pass import OnePassAdjoint


def as_adjoint(adjoint: AbstractSolver | AbstractAdjoint) -> AbstractAdjoint:
    """An adjoint as it is; a bare solver as that of the derivative's linear recurrence."""
    if isinstance(adjoint, AbstractAdjoint):
        return adjoint
    return OnePassAdjoint() if adjoint.stepwise else LinearSolveAdjoint(adjoint)


def default_adjoint(platform: str | None = None) -> AbstractLinearAdjoint:
    """The default adjoint of a platform.

    On a CPU, one pass over all steps, which stores no Jacobians. Elsewhere Newton's method, whose
    single correction is exact here.
    """
    return OnePassAdjoint() if chosen_platform(platform) == "cpu" else LinearSolveAdjoint()
