"""Which solver a recurrence would get, for whatever states it: a step, a cell or a layer."""

from typing import Any

from jaxtyping import PyTree

from .._algebra import AbstractAlgebra
from .._platform import check_platform
from .._recurrence import Recurrence
from .._select import Choice, choose
from ..adjoints import AbstractAdjoint
from ..solvers import AbstractSolver
from ..structures import AbstractStructure
from ._problem import AnyRecurrence, Problem, check_batch_size, make_problem


def select_solver(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    structure: AbstractStructure | None = None,
    algebra: AbstractAlgebra | None = None,
    platform: str | None = None,
    batch_size: int | None = None,
) -> tuple[AbstractSolver, str]:
    """The solver that `solve(..., solver=None)` would use, or that a layer uses, and why.

    It is complete, the chunk size and the scan included: passed to `solve`, with the adjoint of
    [`pararnn.select_adjoint`][], it is the program of that platform on any other.

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][].
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and `init` may be left out. Only shapes and dtypes matter, so
        `jax.ShapeDtypeStruct`s will do.
    - `structure`, `algebra`: as for [`pararnn.solve`][].
    - `platform`: `"cpu"`, `"gpu"`, `"cuda"`, `"rocm"` or `"tpu"`; `None` is
        `jax.default_backend()`.
    - `batch_size`: how many such sequences there are at once. The choice does not depend on it; the
        reason says how to measure whether it should.

    **Returns:**

    `(solver, reason)`.

    **Raises:**

    `ValueError` or `TypeError`, naming the argument.
    """
    problem, choice = _choose(
        recurrence,
        xs,
        init,
        structure=structure,
        algebra=algebra,
        platform=platform,
        batch_size=batch_size,
    )
    reason = choice.reason
    if problem.solver is not None:
        reason = "The layer was made with this solver."
    elif batch_size is not None and batch_size > 1 and not choice.solver.stepwise:
        reason += (
            f" A batch of {batch_size} is not taken into account: where it keeps the device busy, "
            f"Sequential() can be faster; `tune(…, batch_size={batch_size})` measures it."
        )
    return choice.solver, reason


def select_adjoint(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    structure: AbstractStructure | None = None,
    platform: str | None = None,
    batch_size: int | None = None,
) -> tuple[AbstractAdjoint, str]:
    """What `solve(..., adjoint=None)` would use for the derivative, or what a layer uses, and why.

    It is complete, as what [`pararnn.select_solver`][] returns, which has the same arguments; the
    `batch_size` counts here.

    **Returns:**

    `(adjoint, reason)`.

    **Raises:**

    `ValueError` or `TypeError`, naming the argument.
    """
    problem, choice = _choose(
        recurrence, xs, init, structure=structure, platform=platform, batch_size=batch_size
    )
    if problem.adjoint is not None:
        return choice.adjoint, "The layer was made with this adjoint."
    return choice.adjoint, choice.adjoint_reason


def _choose(
    recurrence, xs, init, *, structure=None, algebra=None, platform=None, batch_size=None
) -> tuple[Problem, Choice]:
    check_batch_size(batch_size)
    platform = check_platform(platform)
    problem = make_problem(
        recurrence, xs, init, structure=structure, algebra=algebra, abstract=True
    )
    stated = Recurrence(
        problem.step,
        problem.us,
        problem.init,
        structure=problem.structure,
        algebra=problem.algebra,
    )
    batch = 1 if batch_size is None else batch_size
    return problem, choose(stated, problem.solver, problem.adjoint, platform=platform, batch=batch)
