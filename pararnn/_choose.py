"""Which solver a recurrence would get, for whatever states it: a step, a cell or a layer."""

from typing import Any

from jaxtyping import PyTree

from ._problem import Recurrence, check_batch_size, make_problem
from ._select import select_solver as _select_solver
from ._select import with_algebra
from ._structure import AbstractStructure
from .solvers import AbstractSolver, Sequential


def select_solver(
    recurrence: Recurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    structure: AbstractStructure | None = None,
    platform: str | None = None,
    batch_size: int | None = None,
) -> tuple[AbstractSolver, str]:
    """The solver that `solve(..., solver=None)` would use, or that a layer uses, and why.

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][].
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and `init` may be left out. Only shapes and dtypes matter, so
        `jax.ShapeDtypeStruct`s will do.
    - `structure`: the Jacobian's structure, if it is known; it is detected otherwise.
    - `platform`: `"cpu"`, `"gpu"`, …; `None` is `jax.default_backend()`.
    - `batch_size`: how many such sequences there are at once. The choice does not depend on it; the
        reason says how to measure whether it should.

    **Returns:**

    `(solver, reason)`.
    """
    check_batch_size(batch_size)
    problem = make_problem(recurrence, xs, init, structure=structure, abstract=True)
    if problem.solver is not None:
        solver, reason = problem.solver, "The layer was made with this solver."
        return with_algebra(solver, problem.algebra) or solver, reason
    chosen, reason = _select_solver(
        problem.step, problem.us, problem.init, structure=problem.structure, platform=platform
    )
    composed = with_algebra(None, problem.algebra, platform)
    if composed is not None:
        chosen, reason = composed, "The cell's steps compose exactly: one associative scan."
    if batch_size is not None and batch_size > 1 and not isinstance(chosen, Sequential):
        reason += (
            f" A batch of {batch_size} is not taken into account: where it keeps the device busy, "
            f"Sequential() can be faster; `tune(…, batch_size={batch_size})` measures it."
        )
    return chosen, reason
