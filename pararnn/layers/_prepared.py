"""A sequence made ready for the recurrence of a layer: its inputs projected, those before the first
taken along, and padding taken out."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from .._checks import check_flags, check_projected, check_xs, to_arrays
from .._misc import num_steps
from .._one_device import OneDevice
from .._packing import Packing, passed_inputs, windows_of_pieces, without_moving, zero_unless
from ..cells import AbstractCell
from ..scans import Sequential


class Given(NamedTuple):
    """What `project` sees: pairs of an input and whether a sequence begins with it (`None` where
    the cell does not ask), and the number of the piece that each belongs to, or `None` if all are
    of one. Those that it is only to look back at come first."""

    inputs: tuple[PyTree[Array], Bool[Array, " inputs"] | None]
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

    def past_of(self, cell: AbstractCell, steps: Int[np.ndarray, " N"]) -> PyTree[Array] | None:
        """The past before some steps, as streaming keeps it beside the state; for a sequence in one
        piece."""
        inputs, starts = self.given.inputs
        windows = np.expand_dims(steps, 1) + np.arange(cell.context)
        rows = jtu.tree_map(lambda x: x[windows], inputs) if cell.context else None
        return _past(rows, None if starts is None else ~starts[steps + cell.context])


def project(cell: AbstractCell, given: Given) -> PyTree[Array]:
    """What the steps consume, without those of the inputs to look back at."""
    inputs, piece = given
    if piece is not None:
        windows = windows_of_pieces(inputs, piece, cell.context)
        us = jax.vmap(lambda window: _projected(cell, *window))(windows)
        return jtu.tree_map(lambda u: u[:, -1], us)
    us = _projected(cell, *inputs)
    return jtu.tree_map(lambda u: u[cell.context :], us) if cell.context else us


def _projected(cell: AbstractCell, xs: PyTree[Array], starts: Any) -> PyTree[Array]:
    us = cell.project(xs) if starts is None else cell.project_with_starts(xs, starts)
    check_projected(us, num_steps(xs))
    return us


def prepare(
    cell: AbstractCell,
    initial: PyTree[Array],
    line: OneDevice,
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
    if mask is not None and line.is_sharded:
        xs, reset = without_moving(line, mask, xs, reset)
    elif mask is not None and length > 0:
        packing = Packing(mask)
        count, xs = packing.count, packing.compact(xs)
        pieces = None if pieces is None else packing.pieces(pieces)
        reset = packing.resets(pieces)
    start, past = _split(cell, initial, state, xs)
    rows, seen = _parts(cell, past)
    starts = None
    if seen is not None:
        starts, seen = _starts(line, seen, reset, mask if line.is_sharded else None, length, count)
    if context == 0:
        return Prepared(xs, Given((xs, starts), None), start, _past(None, seen), reset, packing)
    inputs = xs, starts
    held = rows, None if starts is None else jnp.zeros(context, bool)
    if line.is_sharded:
        given, rows, places = _on_a_line(context, line, inputs, held, reset, mask)
        return Prepared(xs, given, start, _past(rows, seen), reset, packing, places)
    extended = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), held, inputs)
    given = Given(extended, None)
    if pieces is not None:
        piece = jnp.concatenate([jnp.zeros(context, int), jnp.cumsum(pieces)])
        given = Given(extended, piece)
        extended = zero_unless(piece == piece[context - 1 + count], extended)
    rows = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, count, context), extended[0])
    return Prepared(xs, given, start, _past(rows, seen), reset, packing)


def _starts(line: OneDevice, seen, reset, mask, length: int, count):
    """At which steps a sequence begins, and whether there has been an input up to the last of them:
    at resets, and at the first step that is not masked, if none was `seen` before.

    **Arguments:**

    - `mask`: which steps are real, if padding stands between them; only where they lie on several
        devices, as it is taken out otherwise.
    - `length`, `count`: how many steps there are here, and how many of the first are real.
    """
    if mask is None:
        first = line.positions(length) == 0
        some = jnp.asarray(count > 0)
    else:
        number = line.sharded(Sequential()).cumulative_sum(mask.astype(int))
        first, some = mask & (number == 1), line.pmax(number[-1]) > 0
    starts = first & ~seen
    return starts if reset is None else starts | reset, seen | some


def _on_a_line(context: int, line: OneDevice, xs, past, reset, mask):
    """What `project` sees on this device, where past inputs come from other devices; the last
    inputs of all; and where padding stands between the inputs, the place of each step's."""
    length = num_steps(xs)
    reset = jnp.zeros(length, bool) if reset is None else reset
    piece = line.sharded(Sequential()).cumulative_sum(reset.astype(int))
    total = line.pmax(piece[-1])
    inputs, count, packing = (xs, piece), length, None if mask is None else Packing(mask)
    if packing is not None:
        inputs, count = packing.compact(inputs), packing.count
    held = past, jnp.zeros(context, piece.dtype)
    before, (after, piece_after) = passed_inputs(line, held, inputs, count, context)
    extended, piece = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), before, inputs)
    places = None if packing is None else jnp.maximum(packing.places, 0)
    return Given(extended, piece), zero_unless(piece_after == total, after[0]), places


def _split(cell, initial, state, xs: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """The state of the recurrence and what is known of the past, of what a call is given as
    `state`."""
    past = no_past(cell, xs)
    if past is None:
        return initial if state is None else state, None
    if state is None:
        return initial, past
    # As `init_state()` returns it. No pair of a state and inputs has the state's structure.
    if jtu.tree_structure(state) == jtu.tree_structure(initial):
        return state, past
    if jtu.tree_structure(state) != jtu.tree_structure((initial, past)) or any(
        jnp.shape(a) != b.shape or _is_flag(a) != _is_flag(b)
        for a, b in zip(jtu.tree_leaves(state[1]), jtu.tree_leaves(past), strict=True)
    ):
        inputs = f"the last {cell.context} inputs" if cell.context else ""
        seen = "whether there has been an input" if cell.sees_starts else ""
        raise ValueError(
            "`state` must be what the call or the step before returned, here a pair of the "
            f"recurrence's state and {' and '.join(filter(None, (inputs, seen)))}, or "
            f"`init_state()`: like {eqx.tree_pformat((initial, past))}; got "
            f"{eqx.tree_pformat(state)}."
        )
    # Zeros of `init_state()` have the dtype of the parameters; inputs may have another one.
    return state[0], jtu.tree_map(lambda a, b: jnp.asarray(a).astype(b.dtype), state[1], past)


def _is_flag(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.bool_)


def no_past(cell: AbstractCell, xs: PyTree[Array] | None) -> PyTree[Array] | None:
    """The past of a sequence that begins: past inputs of zeros, or that there has been no input, or
    both; `None` if the cell needs neither.

    **Arguments:**

    - `xs`: inputs, of which shapes and dtypes count; only of a cell with a `context`.
    """
    context, rows = cell.context, None
    if context > 0:
        rows = jtu.tree_map(lambda x: jnp.zeros((context, *x.shape[1:]), x.dtype), xs)
    return _past(rows, jnp.asarray(False) if cell.sees_starts else None)


def _past(rows: PyTree[Array] | None, seen: Array | None) -> PyTree[Array] | None:
    """The last inputs, and whether there has been any, as a layer keeps them."""
    if seen is None:
        return rows
    return seen if rows is None else (rows, seen)


def _parts(cell: AbstractCell, past: Any) -> tuple[PyTree[Array] | None, Any]:
    """The inverse of `_past`."""
    if not cell.sees_starts:
        return past, None
    return past if cell.context > 0 else (None, past)
