"""Outputs without all states: checkpointing by segments.

A state that is a matrix is many times larger than what a step consumes and outputs. Where only
outputs are wanted, a scan over segments stores the states between segments; the states inside a
segment, and its projection, are freed with it and recomputed for the derivative.
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
from ._sequence import ProjectInputs, project

# A state this many times larger than what a step consumes is recomputed rather than stored.
_LARGE = 4
# Shorter segments would leave an accelerator idle.
_MIN_SIZE_ON_ACCELERATORS = 1024

# `(state, us, reset)` to the state after these steps, their outputs, and the result.
ChunkFn = Callable[
    [PyTree[Array], PyTree[Array], Any], tuple[PyTree[Array], PyTree[Array], RESULTS]
]


class Outputs(NamedTuple):
    """The outputs of all steps, the state after the last one, and the result."""

    ys: PyTree[Array]
    final: PyTree[Array]
    result: RESULTS


def default_segment_size(state: PyTree[Any], us: PyTree[Any], length: int) -> int:
    """All steps, unless states are large; then `sqrt(length)`, or more on an accelerator.

    **Arguments:**

    - `state`, `us`: a state, and what one step consumes; shapes are enough.
    - `length`: the number of steps.
    """
    consumed = sum(u.size for u in jtu.tree_leaves(us))
    if sum(h.size for h in jtu.tree_leaves(state)) < _LARGE * consumed:
        return length
    least = 1 if chosen_platform(None) == "cpu" else _MIN_SIZE_ON_ACCELERATORS
    return max(math.isqrt(length), least)


def scan_segments(
    cell: AbstractCell,
    levels: Sequence[tuple[int, ChunkFn]],
    inputs: ProjectInputs,
    start: PyTree[Array],
    initial: PyTree[Array],
    reset: Bool[Array, " L"] | None,
    *,
    length: int,
    count: Int[Array, ""] | None,
) -> Outputs:
    """The outputs of a sequence of at least one step.

    **Arguments:**

    - `levels`: (segment size, function), from coarse to fine. The first one makes all outputs;
        finer ones recompute only the segment in which the final state lies.
    - `inputs`: what `project` sees.
    - `start`, `initial`: the states before the first step, and at resets.
    - `reset`: the steps that start anew, or `None`.
    - `length`: the number of steps.
    - `count`: how many of the first steps lead to the final state; `None` is all.
    """
    (size, apply), *finer = levels
    size = min(size, length)
    if size == length and count is None:
        final, ys, result = apply(start, project(cell, inputs), reset)
        return Outputs(ys, final, result)
    segments = (
        jtu.tree_map(lambda x: _cut(x, length, size, cell.context), inputs),
        jtu.tree_map(lambda x: _cut(x, length, size, 0), reset),
    )

    # Recomputed in the derivative, so that only the states between segments are stored.
    @jax.checkpoint  # pyright: ignore[reportUntypedFunctionDecorator]
    def body(state, segment):
        inputs, reset = segment
        after, ys, result = apply(state, project(cell, inputs), reset)
        return after, (ys, state, result)

    final, (ys, before, results) = jax.lax.scan(body, start, segments)
    ys = jtu.tree_map(lambda y: y.reshape(-1, *y.shape[2:])[:length], ys)
    if count is not None or length % size:
        count = jnp.asarray(length if count is None else count)
        index = jnp.maximum(count - 1, 0) // size
        state, (inputs, reset) = jtu.tree_map(lambda x: x[index], (before, segments))
        count = count - index * size
        if finer:
            final = scan_segments(
                cell, finer, inputs, state, initial, reset, length=size, count=count
            ).final
        else:
            final = _scan_first(cell.step, state, initial, project(cell, inputs), reset, count)
    return Outputs(ys, final, _worst(results))


def _cut(x: Array, length: int, size: int, context: int) -> Array:
    """Segments with the `context` rows before each; the last one is filled up with copies of the
    last row."""
    surplus = -length % size
    if surplus:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (surplus, *x.shape[1:]))])
    if context == 0:
        return x.reshape(-1, size, *x.shape[1:])
    first = np.arange(0, length, size)
    return x[np.expand_dims(first, 1) + np.expand_dims(np.arange(size + context), 0)]


def _scan_first(step, state, initial, us, reset, count: Int[Array, ""]) -> PyTree[Array]:
    """The state after the first `count` steps."""

    def body(state, inputs):
        i, u, anew = inputs
        before = state if anew is None else bool_where(anew, initial, state)
        return bool_where(i < count, step(before, u), state), None

    return jax.lax.scan(body, state, (jnp.arange(num_steps(us)), us, reset))[0]


def _worst(results: RESULTS) -> RESULTS:
    """The result of all segments together."""
    right, infinite = results == RESULTS.successful, results == RESULTS.nonfinite
    worst = RESULTS.where(jnp.all(right), RESULTS.successful, RESULTS.not_converged)
    return RESULTS.where(jnp.any(infinite), RESULTS.nonfinite, worst)
