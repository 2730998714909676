"""A sequence on one device: the exchange between shards, trivial here, of `pararnn.sharding`.

Every exchange between shards is an operation of an `OneDevice` here, or of a `TimeShards` there,
which [`pararnn.solve`][] chooses once. On one device each of them is the identity or close to it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._misc import previous_states, time_slice
from ._tracing import ConvertedStep, convert_step

_T = TypeVar("_T")
# The name of an axis of a mesh, or of several that are counted as one.
AxisName = str | tuple[str, ...]


class Reduced(NamedTuple):
    """Maxima and sums over all devices."""

    maxima: Sequence[Float[Array, ""]]
    sums: Sequence[Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """A sequence all of whose steps are on this device.

    Methods with rows take arrays whose leading axis is this device's shard of some axis along time,
    in the order of time.

    - `axis`: the axis of a mesh along which the shards lie; here `None`.
    - `reverse`: whether time runs from the last row to the first.
    """

    axis: AxisName | None = dataclasses.field(default=None, kw_only=True)
    reverse: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether the sequence lies on several devices, or might."""
        return False

    @property
    def count(self) -> int:
        """The number of devices."""
        return 1

    @property
    def index(self) -> Int[Array, ""] | int:
        """The number of devices before this one in time."""
        return 0

    @property
    def is_first(self) -> Bool[Array, ""] | bool:
        """Whether time begins on this device."""
        return True

    def backwards(self) -> "OneDevice":
        """The same shards in the opposite direction of time."""
        return dataclasses.replace(self, reverse=not self.reverse)

    def positions(self, rows: int) -> Int[Array, " rows"]:
        """The global indices of the rows."""
        return jnp.arange(rows)

    # --- exchange between neighbours ----------------------------------------------------------

    def shift_from_prev(self, tree: PyTree[Array], first: PyTree[Array]) -> PyTree[Array]:
        """`tree` of the previous device; `first` on the first device."""
        return first

    def shift_right(self, rows: PyTree[Array], first: PyTree[Array] | None = None) -> PyTree[Array]:
        """For each row the previous one. `first`, a single row, precedes all; `None` is zero."""
        return previous_states(first, rows)

    def shift_left(self, rows: PyTree[Array], last: PyTree[Array]) -> PyTree[Array]:
        """For each row the next one. `last`, a single row, follows all."""
        following = self.backwards().shift_from_prev(jtu.tree_map(lambda x: x[0], rows), last)
        return jtu.tree_map(
            lambda a, x: jnp.concatenate([x[1:], jnp.expand_dims(a, 0)]), following, rows
        )

    # --- reductions over all devices ----------------------------------------------------------

    def all_gather(self, tree: PyTree[Array]) -> PyTree[Array]:
        """`tree` of every device along a new leading axis, in the order of time. For small trees:
        every device gets all of it."""
        return jtu.tree_map(lambda x: jnp.expand_dims(x, 0), tree)

    def reduce(self, maxima: list[Array], sums: list[Array]) -> Reduced:
        """Maxima and sums over all devices, in one exchange."""
        return Reduced(maxima, sums)

    def any(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether the flag is set on any device."""
        return flag

    def pmax(self, x: Array) -> Array:
        """The elementwise maximum over all devices."""
        return x

    def psum(self, x: Array) -> Array:
        """The elementwise sum over all devices."""
        return x

    def from_first(self, tree: PyTree[Array]) -> PyTree[Array]:
        """`tree` of the first device."""
        return tree

    def from_last(self, tree: PyTree[Array]) -> PyTree[Array]:
        """`tree` of the last device, of a type that is the same on all."""
        return tree

    def replicate(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Numbers and flags that are equal on all devices, of types that say so."""
        return tree

    def sequenced_after(self, x: Array, other: Array) -> Array:
        """`x`, computed after `other`; no element of either is negative. Collectives that do not
        depend on each other may start in another order on each device, and then XLA's CPU client
        waits for ever."""
        return x

    def sharded(self, scan: _T) -> _T:
        """The scan over the elements of all shards, of which `scan` does those of one device."""
        return scan

    # --- types of arrays, and control flow -------------------------------------------------------

    def place_like(self, tree: PyTree[Any], like: PyTree[Any]) -> PyTree[Any]:
        """The same values, of types that vary along all mesh axes along which `like` does. For the
        constants that a loop starts from: a carry keeps its type."""
        return tree

    def spread(self, tree: PyTree[Array], index: Array) -> PyTree[Array]:
        """The same values, batched wherever the scalar `index` is, which selects among them."""
        return tree

    def convert_step(
        self,
        step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
        xs: PyTree[Array],
        init: PyTree[Array],
        data: PyTree[Any],
    ) -> tuple[ConvertedStep, PyTree[Any], PyTree[Any]]:
        """`(converted, out, data)`: the step with all that it closes over as leaves; the shapes and
        dtypes that it returns; and the arrays of `data`, of types that a loop over the steps may
        carry."""
        converted, out, _ = convert_step(step, init, time_slice(xs))
        return converted, out, data

    def while_loop(
        self, unfinished: Callable[[_T], Bool[Array, ""]], turn: Callable[[_T], _T], carry: _T
    ) -> _T:
        """`jax.lax.while_loop` whose turns may exchange values between devices."""
        return jax.lax.while_loop(unfinished, turn, carry)

    def once_where(
        self, pending: Bool[Array, ""], value: _T, turn: Callable[[_T], _T], scope: str
    ) -> _T:
        """`turn(value)` where `pending`, else `value`. A loop of at most one turn, named `scope`:
        under `vmap`, a `cond` would run both branches, and copy for each sequence what they close
        over."""

        def body(carry):
            return self.place_like((jnp.zeros_like(carry[0]), turn(carry[1])), carry)

        carry = self.place_like((pending, value), (pending, value))
        with jax.named_scope(scope):
            return self.while_loop(lambda carry: carry[0], body, carry)[1]

    def raiser(
        self,
        tree: PyTree[Array],
        failed: Bool[Array, ""],
        index: Int[Array, ""],
        messages: Sequence[str],
    ) -> tuple[Bool[Array, ""], Callable[[], Bool[Array, ""]] | None]:
        """`(some, error)`: whether `failed` holds for any sequence of a batch and on any device;
        and a function that then raises `messages[index]` at run time, and else returns False.
        `error` is None if it can only be printed, which has been done then."""
        some = jax.lax.stop_gradient(eqxi.unvmap_any(failed))
        index = jax.lax.stop_gradient(eqxi.unvmap_max(index))
        return some, lambda: eqx.branched_error_if(jnp.asarray(False), some, index, messages)
