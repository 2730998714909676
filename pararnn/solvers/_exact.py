"""Recurrences that need no iteration: affine ones, and those with an algebra."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, PyTree

from .._algebra import AbstractAlgebra
from .._detection import is_affine
from .._devices import typed_slice
from .._linear import LinearMethod
from .._misc import ResettingStep, bool_where
from .._solution import Stats
from .._structure import AbstractStructure
from .._traits import check_tangents
from ._base import AbstractSolver, check_linear_method
from ._newton import Newton
from ._shooting import multiple_shooting

# A step that takes more is none that one pass solves.
_MAX_ITERS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeScan(AbstractSolver):
    """Composes all steps in one parallel scan, without iterating.

    For steps that are affine in the state (which is detected), such as linear recurrent units,
    gated linear attention and delta rules; and for steps with an algebra, such as the clamps of
    [`pararnn.MinMax`][]. Raises a `ValueError` at trace time for other steps. The result is checked
    against the step, like that of every other solver: what is still missing is solved for again, a
    few times if need be, and finished sequentially where that does not help.

    **Arguments:**

    - `algebra`: an [`pararnn.AbstractAlgebra`][] that contains the steps; `None` for affine steps.
        [`pararnn.RNN`][] passes its cell's.
    - `linear_method`: how the scan of an affine step runs, as in [`pararnn.linear_recurrence`][].
    """

    algebra: AbstractAlgebra | None = None
    linear_method: LinearMethod | None = None

    def __post_init__(self):
        check_linear_method(self.linear_method)
        if self.algebra is not None and not isinstance(self.algebra, AbstractAlgebra):
            raise TypeError(
                f"`algebra` must be a pararnn.AbstractAlgebra or None; got {self.algebra!r}."
            )


def associative_scan(
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    *,
    solver: AssociativeScan,
    structure: AbstractStructure,
    report: Callable[[int, float, int, int], Any] | None = None,
) -> tuple[PyTree[Array], Bool[Array, ""], Stats]:
    """`(states, converged, stats)` of a recurrence of at least one step."""
    check_tangents(solver, step, init, typed_slice(xs))
    guess = None
    if solver.algebra is not None:
        guess = _compose(solver.algebra, step, xs, init)
    elif not is_affine(step, init, typed_slice(xs)):
        raise ValueError(
            "`solver=AssociativeScan()` needs a `step` that is affine in the state, but its "
            "Jacobian depends on the state. Use Newton(), or pass an `algebra` that has it."
        )
    # An affine recurrence is one correction of Newton's method from anywhere. An algebra may not be
    # the step's, `stop_gradient` can hide a nonlinearity, and the rounding of long products adds
    # up: never trust. What is missing is the next correction, if any is needed.
    newton = Newton(chunk_size=1, linear_method=solver.linear_method, max_iters=_MAX_ITERS)
    return multiple_shooting(
        step, xs, init, guess, solver=newton, structure=structure, report=report
    )


def _compose(algebra, step, xs, init):
    combined = jax.lax.associative_scan(
        jax.vmap(lambda earlier, later: algebra.compose(later, earlier)),
        _elements(algebra, step, xs),
    )
    return jax.vmap(algebra.apply, in_axes=(0, None))(combined, init)


def _elements(algebra, step, xs):
    if not isinstance(step, ResettingStep):
        return jax.vmap(algebra.element)(xs)

    def element(flag, u):
        ordinary = algebra.element(u)
        return bool_where(
            flag, algebra.constant(algebra.apply(ordinary, step.reset_state)), ordinary
        )

    return jax.vmap(element)(*xs)
