r"""One pass over the steps of each device, and the exchange between devices.

The tangents of a device's states follow from those of its arrays and from the tangent $v$ of the
previous device's last state; cotangents likewise from the next device. Neither is known when all
devices start at once. So each starts from its neighbour's last few steps run from zero, and repeats
if the value it receives differs. All is exact after as many turns as there are devices; after one,
if the derivative decays within those few steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._misc import bool_where, make_ravel, or_zeros
from .._one_device import OneDevice
from .._recurrence import Recurrence
from ..solvers._time_sharded import OVERLAP
from ..solvers._tolerance import Tolerance
from ._linear_solve import tied


class Tangents(NamedTuple):
    """The tangents of the arrays of a recurrence, `None` for zero."""

    step: PyTree[Array | None]
    xs: PyTree[Array | None]
    init: PyTree[Array | None]


# `(recurrence, states, tangents, added)` to the tangents of the last state and of all states of a
# recurrence that lies on one device, where `added` is added to those of each step.
Pass = Callable[
    [Recurrence, PyTree[Array], Tangents, PyTree[Array]], tuple[PyTree[Array], PyTree[Array]]
]


def sharded_tangents(
    one_pass: Pass,
    block_size: int,
    recurrence: Recurrence,
    states: PyTree[Array],
    tangents: Tangents,
) -> PyTree[Array]:
    """The tangents of all states, each device making `one_pass`, in blocks of so many steps, over
    its own, or a few.

    They are a linear solve whose unknowns are the tangents of the states *and* of what these depend
    on: so what flows back reaches the parameters in the same pass.
    """
    shards, length = recurrence.row_shards, recurrence.length
    step, xs, init = recurrence.step, recurrence.xs, recurrence.init
    start = shards.shift_from_prev(_row(states, -1), init)
    zero = jtu.tree_map(jnp.zeros_like, init)
    window = min(OVERLAP, length)
    differ = _difference(recurrence)

    def pass_over(rows: slice, incoming, tangents, added):
        """The tangents of the last of some states and of all of them, from that of the state
        before them."""
        before = _row(states, rows.start - 1) if rows.start else start
        here, ours, tangents_xs, added = _rows((states, xs, tangents.xs, added), rows)
        tangents = Tangents(tangents.step, tangents_xs, incoming)
        return one_pass(Recurrence(step, ours, before), here, tangents, added)

    @jax.checkpoint
    def residual(unknowns):
        v, tangents = unknowns
        _, moved = eqx.filter_jvp(
            lambda step, xs, init, states: jax.vmap(step)(shards.shift_right(states, init), xs),
            (step, xs, init, states),
            (*tangents, v),
        )
        return jtu.tree_map(jnp.subtract, v, or_zeros(moved, states)), tangents

    @functools.partial(jax.checkpoint, static_argnums=0)
    def solve(_, given):
        added, tangents = given
        run = functools.partial(pass_over, slice(0, length), tangents=tangents, added=added)
        guess = pass_over(slice(length - window, length), zero, tangents, added)
        first = or_zeros(tangents.init, init)
        _, v = _fixed_point_over_devices(shards, run, guess[0], first, differ)
        return v, tangents

    @functools.partial(jax.checkpoint, static_argnums=0)
    def transpose_solve(_, cotangents):
        g, of_tangents = cotangents
        linear = zero, of_tangents._replace(init=None), g

        def pull(rows: slice, g, incoming):
            """The cotangents of the state before some steps, and of the arrays and each step, from
            those of their states and, `incoming`, of the last one from the steps after it."""
            pulled = jax.linear_transpose(functools.partial(pass_over, rows), *linear)
            leaving, *others = pulled((incoming, g))
            return leaving, others

        first_rows = slice(0, window)
        guess, _ = pull(first_rows, _rows(g, first_rows), zero)
        # In the blocks of the pass: else XLA makes one array for the pass, and another for those
        # that may follow.
        block = block_size if length % block_size == 0 else 1
        blocks = jtu.tree_map(lambda x: x.reshape(-1, block, *x.shape[1:]), g)

        def run(incoming):
            g = jtu.tree_map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)
            return pull(slice(0, length), g, incoming)

        leaving, (pulled, flowed) = _fixed_point_over_devices(
            shards.backwards(), run, guess, zero, differ
        )
        first = bool_where(jnp.asarray(shards.is_first), leaving, zero)
        # Of a state of several arrays, some may have tangents and others none.
        first = jtu.tree_map(_if_there_is, of_tangents.init, first, is_leaf=lambda t: t is None)
        return flowed, jtu.tree_map(jnp.add, of_tangents, pulled._replace(init=first))

    given = tied(jtu.tree_map(jnp.zeros_like, states), tangents), tangents
    return jax.lax.custom_linear_solve(residual, given, solve, transpose_solve)[0]


def _if_there_is(tangent: Array | None, x: PyTree[Array]) -> PyTree[Array | None]:
    return None if tangent is None else x


def _row(tree: PyTree[Array], index: int) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[index], tree)


def _rows(tree: PyTree[Array], rows: slice) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[rows], tree)


def _difference(recurrence: Recurrence) -> Callable[[Any, Any], Bool[Array, ""]]:
    """Whether two tangents or cotangents of a state differ on any device by more than the
    tolerance, each element compared to those that it depends on."""
    tolerance = Tolerance(recurrence.init, None, 0.0)
    ravel = make_ravel(recurrence.init)[0]

    def differ(a, b):
        a, b = (jnp.expand_dims(ravel(x), 0) for x in (a, b))
        scale = tolerance.of_connected(b, recurrence.structure)
        return recurrence.shards.any(jnp.any(tolerance.norm(a - b, scale) > 1))

    return differ


def _fixed_point_over_devices(
    shards: OneDevice,
    run: Callable[[Any], tuple[Any, Any]],
    guess: Any,
    first: Any,
    differ: Callable[[Any, Any], Bool[Array, ""]],
) -> tuple[Any, Any]:
    """`run(incoming)` on each device, a pair of what leaves it and anything else, with `incoming`
    what leaves the previous device: `first` on the first one, and `guess` to begin with."""
    incoming = shards.shift_from_prev(guess, first)
    made = run(incoming)
    arrived = shards.shift_from_prev(made[0], first)

    def unsettled(carry):
        turn, arrived, incoming, _ = carry
        # The numbers may be none at all; but every turn makes one more device exact.
        return differ(incoming, arrived) & (turn < shards.count)

    def again(carry):
        turn, arrived, _, _ = carry
        made = run(arrived)
        return turn + 1, shards.shift_from_prev(made[0], first), arrived, made

    with jax.named_scope("pararnn_passes"):
        carry = shards.place_like((jnp.asarray(1), arrived, incoming, made), made)
        return shards.while_loop(unsettled, again, carry)[3]
