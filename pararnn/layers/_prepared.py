"""A sequence made ready for the recurrence of a layer: its inputs projected, those before the first
taken along, and padding taken out."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._checks import check_flags, check_projected, check_xs, to_arrays
from .._line import Line
from .._misc import num_steps
from .._packing import Packing, passed_inputs, windows_of_pieces, without_moving, zero_unless
from ..cells import AbstractCell
from ..scans import Sequential
from ..scans._named import across


class Prepared(NamedTuple):
    """A sequence, ready to be solved: its inputs, what the steps consume, the state to start from,
    the inputs to carry along, the steps that start anew, and how to undo the removal of padding."""

    xs: PyTree[Array]
    us: PyTree[Array]
    start: PyTree[Array]
    past: PyTree[Array] | None
    reset: Bool[Array, " L"] | None
    packing: Packing | None


def prepare(
    cell: AbstractCell,
    initial: PyTree[Array],
    line: Line,
    xs: Any,
    state: Any,
    reset: Any = None,
    mask: Any = None,
) -> Prepared:
    """Everything up to the recurrence.

    **Arguments:**

    - `initial`: the state of the recurrence that starts anew.
    - `line`: where the steps lie.
    - `xs`, `state`, `reset`, `mask`: as for calling an [`pararnn.RNN`][].
    """
    xs = to_arrays("xs", xs)
    check_xs(xs)
    length, context = num_steps(xs), cell.context
    packing, count, pieces = None, length, None
    if reset is not None:
        reset = pieces = check_flags("reset", reset, length)
    if mask is not None:
        mask = check_flags("mask", mask, length)
    if mask is not None and line.is_cut:
        xs, reset = without_moving(line, mask, xs, reset)
    elif mask is not None and length > 0:
        packing = Packing(mask)
        count, xs = packing.count, packing.compact(xs)
        pieces = None if pieces is None else packing.pieces(pieces)
        reset = packing.resets(pieces)
    start, past = _split(cell, initial, state, xs)
    if context == 0:
        return Prepared(xs, _project(cell, xs), start, None, reset, packing)
    if line.is_cut:
        us, past = _project_part(cell, line, xs, past, reset, mask)
        return Prepared(xs, us, start, past, reset, packing)
    extended = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), past, xs)
    if pieces is None:
        us = jtu.tree_map(lambda u: u[context:], _project(cell, extended))
    else:
        piece = jnp.concatenate([jnp.zeros(context, int), jnp.cumsum(pieces)])
        us = _project_pieces(cell, extended, piece)
        extended = zero_unless(piece == piece[context - 1 + count], extended)
    past = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, count, context), extended)
    return Prepared(xs, us, start, past, reset, packing)


def _project_part(cell, line, xs, past, reset, mask):
    """What the steps of this device consume, and the last inputs of all; past inputs come from
    other devices."""
    context, length = cell.context, num_steps(xs)
    reset = jnp.zeros(length, bool) if reset is None else reset
    piece = across(Sequential(), line).cumulative_sum(reset.astype(int))
    total = line.largest(piece[-1])
    inputs, count, packing = (xs, piece), length, None if mask is None else Packing(mask)
    if packing is not None:
        inputs, count = packing.compact(inputs), packing.count
    held = past, jnp.zeros(context, piece.dtype)
    before, (after, piece_after) = passed_inputs(line, held, inputs, count, context)
    extended, piece = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), before, inputs)
    us = _project_pieces(cell, extended, piece)
    if packing is not None:
        places = jnp.maximum(packing.places, 0)
        us = jtu.tree_map(lambda u: u[places], us)
    return us, zero_unless(piece_after == total, after)


def _project_pieces(cell, extended: PyTree[Array], piece: Int[Array, " inputs"]):
    windows = windows_of_pieces(extended, piece, cell.context)
    return jtu.tree_map(lambda u: u[:, -1], jax.vmap(lambda xs: _project(cell, xs))(windows))


def _project(cell, xs: PyTree[Array]) -> PyTree[Array]:
    us = cell.project(xs)
    check_projected(us, num_steps(xs))
    return us


def _split(cell, initial, state, xs: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """The state of the recurrence and the past inputs, of what a call is given as `state`."""
    context = cell.context
    if context == 0:
        return initial if state is None else state, None
    past = no_inputs(cell, xs)
    if state is None:
        return initial, past
    # As `init_state()` returns it. No pair of a state and inputs has the state's structure.
    if jtu.tree_structure(state) == jtu.tree_structure(initial):
        return state, past
    if jtu.tree_structure(state) != jtu.tree_structure((initial, past)) or any(
        jnp.shape(a) != jnp.shape(b)
        for a, b in zip(jtu.tree_leaves(state[1]), jtu.tree_leaves(past), strict=True)
    ):
        raise ValueError(
            "`state` must be what the call or the step before returned, here a pair of the "
            f"recurrence's state and the last {context} inputs, or `init_state()`: like "
            f"{eqx.tree_pformat((initial, past))}; got {eqx.tree_pformat(state)}."
        )
    return state


def no_inputs(cell: AbstractCell, xs: PyTree[Array]) -> PyTree[Array]:
    """What stands for the inputs before the first."""
    return jtu.tree_map(lambda x: jnp.zeros((cell.context, *x.shape[1:]), x.dtype), xs)
