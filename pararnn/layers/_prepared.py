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


class Given(NamedTuple):
    """What `project` sees: inputs, and the number of the piece that each belongs to, or `None` if
    all are of one. Those that it is only to look back at come first."""

    inputs: PyTree[Array]
    piece: Int[Array, " inputs"] | None


class Prepared(NamedTuple):
    """A sequence, ready to be projected and solved: its inputs, as they are and as `project` sees
    them, the state to start from, the inputs to carry along, the steps that start anew, and how to
    undo the removal of padding; on several devices, where each step's projection is instead."""

    xs: PyTree[Array]
    given: Given
    start: PyTree[Array]
    past: PyTree[Array] | None
    reset: Bool[Array, " L"] | None
    packing: Packing | None
    places: Int[Array, " L"] | None = None

    def us(self, cell: AbstractCell) -> PyTree[Array]:
        """What the steps consume."""
        us, places = project(cell, self.given), self.places
        return us if places is None else jtu.tree_map(lambda u: u[places], us)


def project(cell: AbstractCell, given: Given) -> PyTree[Array]:
    """What the steps consume, without those of the inputs to look back at."""
    inputs, piece = given
    if piece is not None:
        windows = windows_of_pieces(inputs, piece, cell.context)
        us = jax.vmap(lambda xs: _projected(cell, xs))(windows)
        return jtu.tree_map(lambda u: u[:, -1], us)
    us = _projected(cell, inputs)
    return jtu.tree_map(lambda u: u[cell.context :], us) if cell.context else us


def _projected(cell: AbstractCell, xs: PyTree[Array]) -> PyTree[Array]:
    us = cell.project(xs)
    check_projected(us, num_steps(xs))
    return us


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
        return Prepared(xs, Given(xs, None), start, None, reset, packing)
    if line.is_cut:
        given, past, places = _on_a_line(context, line, xs, past, reset, mask)
        return Prepared(xs, given, start, past, reset, packing, places)
    extended = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), past, xs)
    given = Given(extended, None)
    if pieces is not None:
        piece = jnp.concatenate([jnp.zeros(context, int), jnp.cumsum(pieces)])
        given = Given(extended, piece)
        extended = zero_unless(piece == piece[context - 1 + count], extended)
    past = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, count, context), extended)
    return Prepared(xs, given, start, past, reset, packing)


def _on_a_line(context: int, line: Line, xs, past, reset, mask):
    """What `project` sees on this device, where past inputs come from other devices; the last
    inputs of all; and where padding stands between the inputs, the place of each step's."""
    length = num_steps(xs)
    reset = jnp.zeros(length, bool) if reset is None else reset
    piece = across(Sequential(), line).cumulative_sum(reset.astype(int))
    total = line.largest(piece[-1])
    inputs, count, packing = (xs, piece), length, None if mask is None else Packing(mask)
    if packing is not None:
        inputs, count = packing.compact(inputs), packing.count
    held = past, jnp.zeros(context, piece.dtype)
    before, (after, piece_after) = passed_inputs(line, held, inputs, count, context)
    extended, piece = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), before, inputs)
    places = None if packing is None else jnp.maximum(packing.places, 0)
    return Given(extended, piece), zero_unless(piece_after == total, after), places


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
