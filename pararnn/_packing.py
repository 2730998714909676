"""Several sequences in one, and padding: both become resets of a sequence without padding."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, PyTree

from ._misc import bool_where, is_symbolic, over_rows
from ._one_device import OneDevice
from .scans import Sequential


def segment_starts(segment_ids: Int[Array | np.ndarray, " L"]) -> Bool[Array, " L"]:
    """The starts of the pieces of a packed sequence: steps whose id differs from the previous one.

    For `reset` of [`pararnn.solve`][] and of the layers. The first step is no start: it continues
    from the state that is passed, the initial one if there is none.

    **Arguments:**

    - `segment_ids`: an integer per step, the same for all steps of one piece.

    **Returns:**

    A boolean per step.

    **Raises:**

    `ValueError` unless `segment_ids` is a one-dimensional array of integers.
    """
    segment_ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.ndim != 1:
        raise ValueError(
            "`segment_ids` must be a one-dimensional array of integers, one per step; got "
            f"{segment_ids.dtype} of shape {segment_ids.shape}."
        )
    return jnp.diff(segment_ids, prepend=segment_ids[:1]) != 0


def mask_of(
    lengths: Integer[Array | np.ndarray, "..."] | int, total: int
) -> Bool[Array, "... total"]:
    """The mask of sequences that are padded at the end: true for the first `length` steps of each.

    For `mask` of [`pararnn.solve`][] and of the layers: of one sequence, or of a batch to be mapped
    over, as in `jax.vmap(lambda xs, mask: rnn(xs, mask=mask))(xs, mask_of(lengths, L))`.

    **Arguments:**

    - `lengths`: how many steps of each sequence are no padding: an integer, or an array of any
        shape, which may be traced.
    - `total`: the number of steps with the padding, `L`.

    **Returns:**

    A boolean per step, behind the axes of `lengths`.

    **Raises:**

    `TypeError` unless `total` is an integer; `ValueError` unless `lengths` are integers, none of
    which, if they are known, is negative or larger than `total`.
    """
    if isinstance(total, bool) or not (isinstance(total, int | np.integer) or is_symbolic(total)):
        raise TypeError(
            f"`total` must be an integer, the number of steps with the padding; got {total!r}."
        )
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            "`lengths` must be integers, the number of steps of each sequence that are no padding; "
            f"got {lengths.dtype} of shape {lengths.shape}."
        )
    lengths = lengths.astype(int)
    if not (isinstance(lengths, jax.core.Tracer) or is_symbolic(total)):
        wrong = lengths[(lengths < 0) | (lengths > total)]
        if wrong.size:
            raise ValueError(
                f"`lengths` must be between 0 and the {total} steps of `total`; got {wrong[0]}."
            )
    steps = jnp.arange(total).reshape(*(1,) * lengths.ndim, total)
    return steps < jnp.expand_dims(lengths, -1)


class Packing(eqx.Module):
    """The unmasked steps of a sequence, moved to its front in their order.

    A solver then meets no padding among the steps that count. The trailing slots repeat the first
    unmasked input and start from the reset state, so that they stay finite (0 * inf is NaN in the
    gradient) and need no iterations.

    - `step_of_slot`: the step in each slot.
    - `slot_of_step`: the slot of the last unmasked step up to each step; -1 if there is none.
    - `count`: the number of unmasked steps.
    - `shards`: where the sequence lies.
    """

    step_of_slot: Int[Array, " L"]
    slot_of_step: Int[Array, " L"]
    count: Int[Array, ""]
    shards: OneDevice = eqx.field(static=True)

    def __init__(self, mask: Bool[Array, " L"], shards: OneDevice):
        self.shards = shards
        length = mask.shape[0]
        self.count = jnp.sum(mask)
        self.slot_of_step = jnp.cumsum(mask) - 1
        order = jnp.flatnonzero(mask, size=length, fill_value=0)
        self.step_of_slot = jnp.where(jnp.arange(length) < self.count, order, order[:1])

    def compact(self, tree: PyTree[Any]) -> PyTree[Array]:
        """Reorders steps to slots. Zeros if no step is unmasked, because all may be NaN then."""

        def one(x):
            moved = self.shards.spread(jnp.asarray(x), self.count)[self.step_of_slot]
            return jnp.where(self.count > 0, moved, jnp.zeros_like(moved))

        return jtu.tree_map(one, tree)

    def expand(self, tree: PyTree[Array], before: PyTree[Array]) -> PyTree[Array]:
        """Reorders slots to steps: the row of the last unmasked step, or `before` if none."""
        front = jnp.maximum(self.slot_of_step, 0)

        def one(x, start):
            missing = over_rows(self.slot_of_step < 0, x)
            return jnp.where(missing, jnp.expand_dims(start, 0), x[front])

        return jtu.tree_map(one, tree, before)

    def last(self, tree: PyTree[Array], before: PyTree[Array]) -> PyTree[Array]:
        """The row of the last unmasked step, or `before` if there is none."""
        some, place = self.count > 0, jnp.maximum(self.count - 1, 0)
        return bool_where(some, jtu.tree_map(lambda x: x[place], tree), before)

    def pieces(self, reset: Bool[Array, " L"]) -> Bool[Array, " L"]:
        """The slots to reset: the step, or a masked one since the previous slot, is reset."""
        moved = jnp.cumsum(self.shards.spread(reset, self.count))[self.step_of_slot]
        return jnp.diff(moved, prepend=0) != 0

    def resets(self, pieces: Bool[Array, " L"] | None) -> Bool[Array, " L"]:
        """Like `pieces`, and all trailing slots."""
        behind = jnp.arange(self.step_of_slot.shape[0]) >= self.count
        return behind if pieces is None else behind | pieces


def without_moving(
    shards: OneDevice, mask: Bool[Array, " L"], xs: PyTree[Array], reset: Bool[Array, " L"] | None
) -> tuple[PyTree[Array], Bool[Array, " L"] | None]:
    """`(xs, reset)` for a sharded recurrence, whose masked steps stay in place and keep the state:
    their inputs are replaced by an unmasked one, and each reset moves to the next unmasked step."""
    some, place = jnp.any(mask), jnp.argmax(mask)
    here = jtu.tree_map(lambda x: x[place], xs)
    has_some, firsts = shards.all_gather((some, here))
    device = jnp.argmax(has_some)

    def one(x, first):
        plausible = jnp.where(jnp.any(has_some), first[device], jnp.zeros_like(first[0]))
        return jnp.where(over_rows(mask, x), x, jnp.expand_dims(plausible, 0))

    xs = jtu.tree_map(one, xs, firsts)
    if reset is None:
        return xs, None
    scan = shards.sharded(Sequential())
    passed = scan.cumulative_sum(reset.astype(int))
    # How many resets had passed at the unmasked step before each.
    last = scan.cumulative_max(jnp.where(mask, passed, 0))
    return xs, mask & (passed > shards.shift_right(last, jnp.zeros_like(last[0])))


def windows_of_pieces(
    extended: PyTree[Array], piece: Int[Array, " inputs"], context: int
) -> PyTree[Array]:
    """The `context + 1` inputs that each step looks at, those of other pieces than its own replaced
    by zeros.

    **Arguments:**

    - `extended`: `context` past inputs, then the `L` inputs.
    - `piece`: the number of the piece to which each of them belongs.
    """
    length = piece.shape[0] - context

    def window(x):
        return jnp.stack([x[j : j + length] for j in range(context + 1)], axis=1)

    same = window(piece) == jnp.expand_dims(piece[context:], 1)
    return zero_unless(same, jtu.tree_map(window, extended))


def passed_inputs(
    shards: OneDevice,
    past: PyTree[Array],
    xs: PyTree[Array],
    count: Int[Array, ""] | int,
    context: int,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """`(before, after)`: the last `context` inputs before those of this device, and the last of
    all; `past` are those before the first, and of `xs` the first `count` rows count."""

    def last(p, x):
        padded = jnp.concatenate([jnp.zeros_like(p), x])
        return jax.lax.dynamic_slice_in_dim(padded, count, context)

    every = shards.all_gather((jtu.tree_map(last, past, xs), jnp.minimum(count, context)))
    place = jnp.arange(context)

    def follow(held, device):
        rows, valid = device

        def one(old, new):
            kept = over_rows(place + valid < context, old)
            return jnp.where(kept, jnp.roll(old, -valid, axis=0), new)

        held = jtu.tree_map(one, held, rows)
        return held, held

    past = shards.place_like(past, (past, every))
    after, held = jax.lax.scan(follow, past, every)
    index = jnp.maximum(shards.index - 1, 0)
    before = jtu.tree_map(lambda h: h[index], held)
    return bool_where(jnp.asarray(shards.is_first), past, before), after


def zero_unless(flags: Bool[Array, "..."], tree: PyTree[Array]) -> PyTree[Array]:
    """Zeros where a flag is not set; the flags belong to the leading axes."""

    def one(x):
        return jnp.where(over_rows(flags, x), x, jnp.zeros_like(x))

    return jtu.tree_map(one, tree)
