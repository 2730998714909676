"""Outputs without the states that they are made of.

A state that is a matrix is many times larger than what a step consumes and gives. Where only
outputs are wanted, a sequence is gone through in segments: a segment's states are gone when its
outputs are made, and so is what was projected for it; the derivative computes them once more, from
the state before the segment, which is kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from .._misc import bool_where, num_steps
from .._platform import chosen_platform
from .._solution import RESULTS
from ..cells import AbstractCell
from ._prepared import Given, project

# From so many times the numbers that a step consumes on, its state is not worth keeping.
_LARGE = 4
# Shorter segments would leave an accelerator idle.
_LEAST_ON_ACCELERATORS = 1024

# `(state, us, reset)` to the state after these steps, their outputs, and how that went.
Through = Callable[
    [PyTree[Array], PyTree[Array], Any], tuple[PyTree[Array], PyTree[Array], RESULTS]
]


class Outputs(NamedTuple):
    """The outputs of all steps, the state after the last one, and how that went."""

    ys: PyTree[Array]
    final: PyTree[Array]
    result: RESULTS


def default_size(state: PyTree[Any], us: PyTree[Any], length: int) -> int:
    """How many steps' states to have at once: all, unless they are large; then, on a CPU, as many
    as there are segments.

    **Arguments:**

    - `state`, `us`: a state, and what one step consumes; shapes are enough.
    - `length`: how many steps there are.
    """
    consumed = sum(u.size for u in jtu.tree_leaves(us))
    if sum(h.size for h in jtu.tree_leaves(state)) < _LARGE * consumed:
        return length
    least = 1 if chosen_platform(None) == "cpu" else _LEAST_ON_ACCELERATORS
    return max(math.isqrt(length), least)


def scan_segments(
    cell: AbstractCell,
    ways: Sequence[tuple[int, Through]],
    given: Given,
    start: PyTree[Array],
    initial: PyTree[Array],
    reset: Bool[Array, " L"] | None,
    *,
    length: int,
    count: Int[Array, ""] | None,
) -> Outputs:
    """The outputs of a sequence of at least one step.

    **Arguments:**

    - `ways`: how many steps a segment has, and what makes them; then, if that may take long, the
        same of the smaller segments of the one in which the final state is.
    - `given`: what its `project` sees.
    - `start`, `initial`: the states before the first step, and where a step starts anew.
    - `reset`: which steps start anew, if any.
    - `length`: how many steps there are.
    - `count`: how many of the steps, from the first on, lead to the final state; `None` is all.
    """
    (size, through), *finer = ways
    size = min(size, length)
    if size == length and count is None:
        final, ys, result = through(start, project(cell, given), reset)
        return Outputs(ys, final, result)
    rows = (
        jtu.tree_map(lambda x: _cut(x, length, size, cell.context), given),
        jtu.tree_map(lambda x: _cut(x, length, size, 0), reset),
    )

    # Recomputed in the derivative, so that only the states between segments are kept.
    @jax.checkpoint  # pyright: ignore[reportUntypedFunctionDecorator]
    def segment(state, inputs):
        given, reset = inputs
        after, ys, result = through(state, project(cell, given), reset)
        return after, (ys, state, result)

    final, (ys, before, results) = jax.lax.scan(segment, start, rows)
    ys = jtu.tree_map(lambda y: y.reshape(-1, *y.shape[2:])[:length], ys)
    if count is not None or length % size:
        count = jnp.asarray(length if count is None else count)
        place = jnp.maximum(count - 1, 0) // size
        state, (left, anew) = jtu.tree_map(lambda x: x[place], (before, rows))
        count = count - place * size
        if finer:
            last = scan_segments(cell, finer, left, state, initial, anew, length=size, count=count)
            return Outputs(ys, last.final, _worst(results))
        final = _some_steps(cell.step, state, initial, project(cell, left), anew, count)
    return Outputs(ys, final, _worst(results))


def _cut(x: Array, length: int, size: int, context: int) -> Array:
    """Into segments, each with the `context` rows before it; the last one is filled up with copies
    of the last row."""
    surplus = -length % size
    if surplus:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (surplus, *x.shape[1:]))])
    if context == 0:
        return x.reshape(-1, size, *x.shape[1:])
    first = np.arange(0, length, size)
    return x[np.expand_dims(first, 1) + np.expand_dims(np.arange(size + context), 0)]


def _some_steps(step, state, initial, us, reset, count: Int[Array, ""]) -> PyTree[Array]:
    """The state after so many of some steps."""

    def one(state, inputs):
        i, u, anew = inputs
        before = state if anew is None else bool_where(anew, initial, state)
        return bool_where(i < count, step(before, u), state), None

    return jax.lax.scan(one, state, (jnp.arange(num_steps(us)), us, reset))[0]


def _worst(results: RESULTS) -> RESULTS:
    """Of the results of all segments."""
    right, infinite = results == RESULTS.successful, results == RESULTS.nonfinite
    worst = RESULTS.where(jnp.all(right), RESULTS.successful, RESULTS.not_converged)
    return RESULTS.where(jnp.any(infinite), RESULTS.nonfinite, worst)
