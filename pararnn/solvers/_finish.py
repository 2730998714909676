"""The sequential finish: one step after another, from device to device if there are several."""

import math

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._misc import bool_where
from .._recurrence import Recurrence
from ._convergence import first_index


def finish_sequentially(
    recurrence: Recurrence, states: PyTree[Array], bad: Bool[Array, " chunks"], chunk_size: int
) -> tuple[PyTree[Array], Int[Array, ""]]:
    """Recomputes the states from the first chunk on that is `bad`.

    **Returns:**

    `(states, steps)`: all states, and how many were recomputed, on all devices together.
    """
    length, shards = recurrence.length, recurrence.shards
    first_step = jnp.minimum(chunk_size * first_index(bad), length)
    if not shards.is_sharded:
        states = _from_step(recurrence, recurrence.init, states, first_step)
        return states, length - first_step
    first = -shards.pmax(-jnp.where(first_step < length, shards.index, shards.count))
    # On the devices that follow, nothing is right.
    first_step = jnp.where(shards.index == first, first_step, 0)
    first_step = jnp.where(shards.index < first, length, first_step)
    last = 0 if recurrence.reverse else -1

    def passed_on(states):
        ends = jtu.tree_map(lambda h: h[last], states)
        return shards.shift_from_prev(ends, recurrence.init)

    def turn(carry):
        device, incoming, states = carry
        begin = jnp.where(shards.index == device, first_step, length)
        states = _from_step(recurrence, incoming, states, begin)
        return device + 1, passed_on(states), states

    carry = shards.place_like((first, passed_on(states), states), states)
    with jax.named_scope("pararnn_relay"):
        states = shards.while_loop(lambda carry: carry[0] < shards.count, turn, carry)[2]
    return states, shards.psum(length - first_step)


def _from_step(
    recurrence: Recurrence,
    before_all: PyTree[Array],
    states: PyTree[Array],
    first_step: Int[Array, ""],
) -> PyTree[Array]:
    """Recomputes the states of this device from one step on; `before_all` is the one before its
    first.

    A loop with a dynamic number of turns, none if all has converged, because `vmap` would run both
    branches of a `cond`. A batched loop also selects over its whole carry at each turn, `states`
    included, so a turn makes about `sqrt(L)` steps.
    """
    step, xs, length = recurrence.step, recurrence.xs, recurrence.length
    reverse = recurrence.reverse
    block = max(1, math.isqrt(length))

    def one(state, x):
        state = step(state, x)
        return state, state

    def rows(times):
        return jnp.where(times < length, length - 1 - times, length) if reverse else times

    def turn(carry):
        start, state, states = carry
        index = rows(start + jnp.arange(block))
        inputs = jtu.tree_map(lambda x: jnp.take(x, index, axis=0, mode="clip"), xs)
        state, new = jax.lax.scan(one, state, inputs)
        states = jtu.tree_map(lambda s, n: s.at[index].set(n, mode="drop"), states, new)
        return start + block, state, states

    before = jtu.tree_map(lambda s: s[rows(first_step - 1)], states)
    state = bool_where(first_step == 0, before_all, before)
    xs = recurrence.shards.spread(xs, first_step)
    carry = (recurrence.shards.place_like(first_step, states), state, states)
    with jax.named_scope("pararnn_finish"):
        return jax.lax.while_loop(lambda carry: carry[0] < length, turn, carry)[2]
