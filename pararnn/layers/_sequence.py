"""The sequence of a call as the cell of a layer sees it: the inputs without padding, the context
before them, and the starts of sequences.

Three index spaces: a *step* is a position in `xs`; a *slot* is a position after padding is taken
out, the real steps first (without a mask, slots are steps); a *row* of what `project` sees is a
slot behind the `context` past inputs.
"""

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


class ProjectInputs(NamedTuple):
    """The arguments of `project`; the first `context` rows are past inputs.

    - `xs`: the inputs.
    - `starts`: whether a sequence begins with each of them; `None` unless the cell `sees_starts`.
    - `piece_ids`: the packed sequence that each belongs to; `None` if there is only one.
    """

    xs: PyTree[Array]
    starts: Bool[Array, " rows"] | None
    piece_ids: Int[Array, " rows"] | None


class SequencePlan(NamedTuple):
    """A sequence, ready to be projected and solved.

    - `xs`: the inputs, by slot.
    - `inputs`: what `project` sees.
    - `start`: the state of the recurrence before the first step.
    - `past`: what the next call needs beside the state, or `None`.
    - `reset`: the slots that start anew, or `None`.
    - `packing`: the map between steps and slots; `None` if they are the same.
    - `slot_of_step`: only with a mask on several devices, where the recurrence runs over padding
        but `project` does not see it.
    """

    xs: PyTree[Array]
    inputs: ProjectInputs
    start: PyTree[Array]
    past: PyTree[Array] | None
    reset: Bool[Array, " L"] | None
    packing: Packing | None
    slot_of_step: Int[Array, " L"] | None = None

    def us(self, cell: AbstractCell) -> PyTree[Array]:
        """The inputs of the cell's steps."""
        us, slots = project(cell, self.inputs), self.slot_of_step
        return us if slots is None else jtu.tree_map(lambda u: u[slots], us)

    def past_of(self, cell: AbstractCell, steps: Int[np.ndarray, " N"]) -> PyTree[Array] | None:
        """The `past` before each of some steps, for a single sequence without padding."""
        xs, starts, _ = self.inputs
        rows = np.expand_dims(steps, 1) + np.arange(cell.context)
        context = jtu.tree_map(lambda x: x[rows], xs) if cell.context else None
        return _join_past(context, None if starts is None else ~starts[steps + cell.context])


def project(cell: AbstractCell, inputs: ProjectInputs) -> PyTree[Array]:
    """The inputs of the cell's steps, one per row behind the context."""
    xs, starts, piece_ids = inputs
    if piece_ids is not None:
        windows = windows_of_pieces((xs, starts), piece_ids, cell.context)
        us = jax.vmap(lambda window: _project(cell, *window))(windows)
        return jtu.tree_map(lambda u: u[:, -1], us)
    us = _project(cell, xs, starts)
    return jtu.tree_map(lambda u: u[cell.context :], us) if cell.context else us


def _project(cell: AbstractCell, xs: PyTree[Array], starts: Any) -> PyTree[Array]:
    us = cell.project(xs) if starts is None else cell.project_with_starts(xs, starts)
    check_projected(us, num_steps(xs))
    return us


def plan_sequence(
    cell: AbstractCell,
    initial: PyTree[Array],
    shards: OneDevice,
    xs: Any,
    state: Any,
    reset: Any = None,
    mask: Any = None,
) -> SequencePlan:
    """Check the arguments of a call, and do everything that precedes the projection.

    **Arguments:**

    - `initial`: the state from which the recurrence starts anew.
    - `shards`: the exchange between the devices along which time is sharded.
    - `xs`, `state`, `reset`, `mask`: as for calling an [`pararnn.RNN`][].
    """
    xs = to_arrays("xs", xs)
    check_xs(xs)
    length = num_steps(xs)
    reset = None if reset is None else check_flags("reset", reset, length)
    mask = None if mask is None else check_flags("mask", mask, length)
    start, past = _split_state(cell, initial, state, xs)
    plan = _plan_on_shard if shards.is_sharded else _plan
    return plan(cell, shards, xs, start, past, reset, mask)


def _plan(cell, shards, xs, start, past, reset, mask) -> SequencePlan:
    length, context = num_steps(xs), cell.context
    packing, count, pieces = None, length, reset
    if mask is not None and length > 0:
        packing = Packing(mask, shards)
        count, xs = packing.count, packing.compact(xs)
        pieces = None if reset is None else packing.pieces(reset)
        reset = packing.resets(pieces)
    context_xs, seen = _split_past(cell, past)
    starts = None
    if seen is not None:
        starts = _starts(shards.positions(length) == 0, seen, reset)
        seen = seen | jnp.asarray(count > 0)
    if context == 0:
        inputs = ProjectInputs(xs, starts, None)
        return SequencePlan(xs, inputs, start, _join_past(None, seen), reset, packing)
    old = context_xs, None if starts is None else jnp.zeros(context, bool)
    rows, starts = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), old, (xs, starts))
    visible, piece_ids = rows, None
    if pieces is not None:
        piece_ids = jnp.concatenate([jnp.zeros(context, int), jnp.cumsum(pieces)])
        # The next call must not look back at pieces before the last one.
        visible = zero_unless(piece_ids == piece_ids[context - 1 + count], rows)
    context_xs = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, count, context), visible)
    inputs = ProjectInputs(rows, starts, piece_ids)
    return SequencePlan(xs, inputs, start, _join_past(context_xs, seen), reset, packing)


def _plan_on_shard(cell, shards, xs, start, past, reset, mask) -> SequencePlan:
    """As `_plan`, for the steps on one device: padding stays in the recurrence, and past inputs
    come from the devices before."""
    length, context = num_steps(xs), cell.context
    scan = shards.sharded(Sequential())
    if mask is not None:
        xs, reset = without_moving(shards, mask, xs, reset)
    context_xs, seen = _split_past(cell, past)
    starts = None
    if seen is not None:
        first, some = shards.positions(length) == 0, jnp.asarray(length > 0)
        if mask is not None:
            number = scan.cumulative_sum(mask.astype(int))
            first, some = mask & (number == 1), shards.pmax(number[-1]) > 0
        starts, seen = _starts(first, seen, reset), seen | some
    if context == 0:
        inputs = ProjectInputs(xs, starts, None)
        return SequencePlan(xs, inputs, start, _join_past(None, seen), reset, None)
    pieces = jnp.zeros(length, bool) if reset is None else reset
    piece_ids = scan.cumulative_sum(pieces.astype(int))
    last_piece = shards.pmax(piece_ids[-1])
    new, count, slot_of_step = (xs, starts, piece_ids), length, None
    if mask is not None:
        packing = Packing(mask, shards)
        new, count = packing.compact(new), packing.count
        slot_of_step = jnp.maximum(packing.slot_of_step, 0)
    old_starts = None if starts is None else jnp.zeros(context, bool)
    old = context_xs, old_starts, jnp.zeros(context, piece_ids.dtype)
    before, (context_xs, _, context_ids) = passed_inputs(shards, old, new, count, context)
    inputs = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), before, new)
    past = _join_past(zero_unless(context_ids == last_piece, context_xs), seen)
    return SequencePlan(xs, ProjectInputs(*inputs), start, past, reset, None, slot_of_step)


def _starts(first: Array, seen: Array, reset: Array | None) -> Bool[Array, " L"]:
    """Where sequences begin: at the `first` real step, unless inputs were `seen` before it, and at
    resets."""
    starts = first & ~seen
    return starts if reset is None else starts | reset


# --- what a call carries to the next one ------------------------------------------------------


def initial_past(cell: AbstractCell, xs: PyTree[Array] | None) -> PyTree[Array] | None:
    """The past before the first input: inputs of zeros, or the flag that there has been no input,
    or both; `None` if the cell needs neither.

    **Arguments:**

    - `xs`: inputs, of which shapes and dtypes count; only of a cell with a `context`.
    """
    context, rows = cell.context, None
    if context > 0:
        rows = jtu.tree_map(lambda x: jnp.zeros((context, *x.shape[1:]), x.dtype), xs)
    return _join_past(rows, jnp.asarray(False) if cell.sees_starts else None)


def _join_past(context_xs: PyTree[Array] | None, seen: Array | None) -> PyTree[Array] | None:
    if seen is None:
        return context_xs
    return seen if context_xs is None else (context_xs, seen)


def _split_past(cell: AbstractCell, past: Any) -> tuple[PyTree[Array] | None, Any]:
    """The inverse of `_join_past`: the last `context` inputs, and whether there has been any."""
    if not cell.sees_starts:
        return past, None
    return past if cell.context > 0 else (None, past)


def _split_state(cell, initial, state, xs: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """The state of the recurrence, and the past, of the `state` that a call was given."""
    past = initial_past(cell, xs)
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


def check_order(cell: AbstractCell, initial: PyTree[Array], state: Any, x: Any) -> None:
    """Raises if the arguments of `step(state, x)` were given in the other order, which shows unless
    inputs are shaped like states."""

    def is_state(tree: Any) -> bool:
        if (cell.context > 0 or cell.sees_starts) and isinstance(tree, tuple) and len(tree) == 2:
            return _shapes(initial) in (_shapes(tree), _shapes(tree[0]))
        return tree is None or _shapes(tree) == _shapes(initial)

    if is_state(x) and (x is None or not is_state(state)):
        raise ValueError(
            "`step` takes the state before the input, `rnn.step(state, x)`; got "
            f"{eqx.tree_pformat(state)} as `state`, and {eqx.tree_pformat(x)}, which is shaped "
            "like a state, as `x`."
        )


def _shapes(tree: PyTree[Any]) -> Any:
    return jtu.tree_structure(tree), [jnp.shape(leaf) for leaf in jtu.tree_leaves(tree)]
