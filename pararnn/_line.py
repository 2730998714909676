"""Where the steps of a sequence lie: all of them here, or parts of them on several devices.

All that passes between devices passes here. Everywhere else, code sees the part of the sequence
that lies on its own device, and asks its line for what the others have. Nothing ever asks for all
of a sequence.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._devices import is_explicit, place, place_like, spread, varying_axes
from ._misc import bool_where, flip_time, over_rows, previous_states

_T = TypeVar("_T")
# The name of an axis of a mesh, or of several that are counted as one.
AxisName = str | tuple[str, ...]


def axis_names(axis: AxisName | None) -> tuple[str, ...]:
    """The names, one or several, or none."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis


class Extremes(NamedTuple):
    """What some devices found: the largest of each of some numbers, and the sums of others."""

    maxima: Sequence[Float[Array, ""]]
    sums: Sequence[Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Line:
    """Equal parts of a sequence, in the order of time.

    - `axis`: the manual axis of a mesh along whose devices the parts lie; `None` if all is here.
    - `reverse`: whether time begins on the last device.

    Methods with rows take arrays whose leading axis is the part of some axis along time that lies
    here, also in the order of time.
    """

    axis: AxisName | None = None
    reverse: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether the sequence lies on several devices, or might."""
        return self.axis is not None

    @property
    def count(self) -> int:
        """How many devices there are."""
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    @property
    def index(self) -> Int[Array, ""] | int:
        """How many devices come before this one in time."""
        if self.axis is None:
            return 0
        index = jax.lax.axis_index(self.axis).astype(int)
        return self.count - 1 - index if self.reverse else index

    @property
    def is_first(self) -> Bool[Array, ""] | bool:
        """Whether time begins here."""
        return self.index == 0

    def backwards(self) -> "Line":
        """The same parts, in the opposite direction."""
        return Line(self.axis, not self.reverse)

    def positions(self, rows: int) -> Int[Array, " rows"]:
        """The numbers of the rows, counted from the first device."""
        here = jnp.arange(rows)
        return here if self.axis is None else self.index * rows + here

    # --- from neighbour to neighbour ----------------------------------------------------------

    def shift_from_prev(self, tree: PyTree[Array], first: PyTree[Array]) -> PyTree[Array]:
        """What the device before has as `tree`; and `first` where there is none."""
        if self.axis is None:
            return first
        step = -1 if self.reverse else 1
        devices = range(self.count)
        pairs = [(i, i + step) for i in devices if i + step in devices]
        moved = _packed(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)
        return bool_where(jnp.asarray(self.is_first), first, moved)

    def shift_right(self, rows: PyTree[Array], first: PyTree[Array] | None = None) -> PyTree[Array]:
        """For each row the one before it; `first` is a single row, before all others, `None` for
        zero."""
        if self.axis is not None:
            first = jtu.tree_map(lambda x: jnp.zeros_like(x[0]), rows) if first is None else first
            first = self.shift_from_prev(jtu.tree_map(lambda x: x[-1], rows), first)
        return previous_states(first, rows)

    def shift_left(self, rows: PyTree[Array], last: PyTree[Array]) -> PyTree[Array]:
        """For each row the one after it; `last` is a single row, after all others."""
        after = self.backwards().shift_from_prev(jtu.tree_map(lambda x: x[0], rows), last)
        return jtu.tree_map(
            lambda a, x: jnp.concatenate([x[1:], jnp.expand_dims(a, 0)]), after, rows
        )

    def after(self, x: Array, other: Array) -> Array:
        """`x`, computed after `other`; no element of either is negative. Collectives that do not
        depend on each other may start in another order on each device, and then XLA's CPU client
        waits for ever."""
        return x if self.axis is None else jnp.maximum(x, -other)

    def while_loop(
        self, unfinished: Callable[[_T], Bool[Array, ""]], turn: Callable[[_T], _T], carry: _T
    ) -> _T:
        """`jax.lax.while_loop` whose turns exchange values between the devices of this line, which
        all find the same to be `unfinished`.

        XLA waits for all devices of the mesh. So where other sequences lie along another axis, the
        loop turns until all are finished, and what is finished stays as it is.
        """
        axes = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
        if self.axis is None or axes <= frozenset(axis_names(self.axis)):
            return jax.lax.while_loop(unfinished, turn, carry)

        def anywhere(carry):
            flag = place(unfinished(carry).astype(np.int32), axes)
            return jax.lax.pmax(flag, tuple(axes)) > 0

        def turned(carry):
            return place_like(bool_where(unfinished(carry), turn(carry), carry), carry)

        return jax.lax.while_loop(anywhere, turned, carry)

    # --- from all to all ----------------------------------------------------------------------

    def all_gather(self, tree: PyTree[Array]) -> PyTree[Array]:
        """What each device has as `tree`, along a new leading axis, in the order of time. For
        little: all devices get all of it."""
        if self.axis is None:
            return jtu.tree_map(lambda x: jnp.expand_dims(x, 0), tree)
        gathered = jtu.tree_map(self._all_gather, tree)
        return flip_time(gathered) if self.reverse else gathered

    def _all_gather(self, x: Array) -> Array:
        if not is_explicit(jax.sharding.get_abstract_mesh()):
            return jax.lax.all_gather(x, self.axis)
        # Where another axis is explicit, JAX 0.10 mistakes the axes of a batched gather.
        index = jnp.arange(self.count) == jax.lax.axis_index(self.axis).astype(int)
        x = jnp.expand_dims(x, 0)
        return self._only_one(over_rows(index, x), x)

    def _only_one(self, mine: Bool[Array, "..."] | bool, x: Array) -> Array:
        """What the one device has for which it is `mine`."""
        number = _as_number(x)
        found = jax.lax.psum(jnp.where(mine, number, jnp.zeros_like(number)), self.axis)
        return found.astype(x.dtype)

    def reduce_with_prefix(
        self, maxima: list[Array], sums: list[Array]
    ) -> tuple[Extremes, Extremes]:
        """`(all, before)`: the largest and the sums of some numbers over all devices, and over
        those before this one, from those of each device; in one exchange."""
        none = Extremes(
            [jnp.full_like(x, -jnp.inf) for x in maxima], list(map(jnp.zeros_like, sums))
        )
        if self.axis is None:
            return Extremes(maxima, sums), none
        here = _stacked([*maxima, *sums])
        gathered = place_like(self.all_gather(here), here)
        is_before = jnp.expand_dims(jnp.arange(self.count) < self.index, 1)
        before = jnp.where(is_before, gathered, jnp.stack([*none.maxima, *none.sums]))
        return _extremes(gathered, len(maxima)), _extremes(before, len(maxima))

    def totals(self, numbers: Sequence[Float[Array, ""]]) -> Sequence[Float[Array, ""]]:
        """The sums of some numbers over all devices, in one exchange."""
        return numbers if self.axis is None else list(self.psum(_stacked(numbers)))

    def any(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether it holds on any device."""
        return flag if self.axis is None else self.pmax(_as_number(flag)) > 0

    def pmax(self, x: Array) -> Array:
        """The largest number of all devices, elementwise."""
        return x if self.axis is None else place_like(jax.lax.pmax(x, self.axis), x)

    def psum(self, x: Array) -> Array:
        """The sum over all devices, elementwise."""
        return x if self.axis is None else place_like(jax.lax.psum(x, self.axis), x)

    def from_first(self, tree: PyTree[Array]) -> PyTree[Array]:
        """What the first device has as `tree`."""
        return self.backwards().from_last(tree)

    def from_last(self, tree: PyTree[Array]) -> PyTree[Array]:
        """What the last device has as `tree`: the same for all, in their types too."""
        if self.axis is None:
            return tree
        is_last = self.index == self.count - 1
        return jtu.tree_map(lambda x: self._only_one(is_last, x), tree)

    def replicate(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Numbers and flags that are the same on all devices, of types that say so."""

        def one(x):
            if not varying_axes(x) & frozenset(axis_names(self.axis)):
                return x
            return jax.lax.pmax(_as_number(x), self.axis).astype(x.dtype)

        return jtu.tree_map(one, tree)


def _as_number(x: Array) -> Array:
    """A flag as 0 or 1: collectives take no flags."""
    return x.astype(np.int32) if x.dtype == bool else x


def _packed(exchange: Callable[[Array], Array], tree: PyTree[Array]) -> PyTree[Array]:
    """An exchange of all leaves of a type at once."""
    leaves, treedef = jtu.tree_flatten(tree)
    if is_explicit(jax.sharding.get_abstract_mesh()):  # JAX joins only what lies alike
        return treedef.unflatten(map(exchange, leaves))
    found: dict[int, Array] = {}
    for dtype in {x.dtype: None for x in leaves}:
        vector, unravel = ravel_pytree({i: x for i, x in enumerate(leaves) if x.dtype == dtype})
        found |= unravel(exchange(vector))
    return treedef.unflatten([found[i] for i in range(len(leaves))])


def _extremes(rows: Float[Array, "devices numbers"], m: int) -> Extremes:
    return Extremes(list(jnp.max(rows[:, :m], axis=0)), list(jnp.sum(rows[:, m:], axis=0)))


def _stacked(numbers: Sequence[Float[Array, ""]]) -> Float[Array, " n"]:
    # On explicit axes JAX stacks only what lies alike.
    known = functools.reduce(jnp.logical_and, [x == x for x in numbers])
    return jnp.stack([spread(x, known) for x in numbers])
