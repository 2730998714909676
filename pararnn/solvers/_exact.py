"""Recurrences that need no iteration: affine ones, and those with an algebra."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._algebra import AbstractAlgebra
from .._detection import is_affine
from .._linear import LinearMethod
from .._misc import ResettingStep, bool_where, time_slice
from .._solution import Stats
from .._structure import AbstractStructure
from .._traits import check_tangents
from ._base import AbstractSolver, check_linear_method
from ._chunks import Chunks, finish_sequentially, first_index
from ._newton import Newton

# The first solves an affine recurrence, the second finds out how far off it is. A rotation over
# 65,536 steps takes one more; a step that takes many is none that one pass solves.
_MAX_CORRECTIONS = 5


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
) -> tuple[PyTree[Array], Bool[Array, ""], Stats]:
    """`(states, converged, stats)` of a recurrence of at least one step."""
    stepwise = Newton(chunk_size=1, linear_method=solver.linear_method)
    check_tangents(solver, step, init, time_slice(xs))
    chunks = Chunks(step, xs, init, stepwise, structure)
    if solver.algebra is not None:
        states = _compose(solver.algebra, step, xs, init)
        starts = jax.vmap(chunks.ravel)(jtu.tree_map(lambda h: h[:-1], states))
    elif is_affine(step, init, time_slice(xs)):
        starts = jnp.zeros((chunks.length - 1, chunks.size), chunks.dtype)
    else:
        raise ValueError(
            "`solver=AssociativeScan()` needs a `step` that is affine in the state, but its "
            "Jacobian depends on the state. Use Newton(), or pass an `algebra` that has it."
        )

    # An algebra may not be the step's, `stop_gradient` can hide a nonlinearity, and the rounding of
    # long products adds up: never trust. What is missing is a linear recurrence driven by the
    # defects, and its solution, added, is the remedy as well.

    def correct(carry):
        count, starts, _, _ = carry
        ends, jacobians = chunks.sweep(starts)
        new, replaced = chunks.correct(starts, ends, jacobians)
        scale = chunks.fine_scale(starts, ends)
        bad = replaced | (chunks.tolerance.norm(new - starts, scale) > 1)
        return count + 1, jnp.where(jnp.any(bad), new, starts), ends, bad

    def unfinished(carry):
        count, _, _, bad = carry
        return (count == 0) | (jnp.any(bad) & (count < _MAX_CORRECTIONS))

    ends = jnp.zeros((chunks.length, chunks.size), chunks.dtype)
    carry = (jnp.asarray(0), starts, ends, jnp.ones(chunks.length - 1, bool))
    count, _, ends, bad = jax.lax.while_loop(unfinished, correct, carry)
    first_step = 1 + first_index(bad)
    states = jax.vmap(chunks.unravel)(ends)
    states = finish_sequentially(step, xs, states, init, first_step, 1)
    finished = chunks.length - first_step
    stats = Stats(
        iterations=count,
        correction=jnp.zeros((), jnp.float32),
        chunk_size=1,
        sequential_steps=count + finished,
        fallback=finished > 0,
    )
    return states, jnp.asarray(True), stats


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
