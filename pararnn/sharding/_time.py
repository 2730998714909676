"""The shards of a sequence whose steps lie on several devices, and all exchange between them.

Other modules see only this device's shard, and use a `TimeShards` for halo exchange and reductions.
No array ever gathers the sequence.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._misc import bool_where, flip_time, over_rows, previous_states
from .._one_device import AxisName, OneDevice, Reduced
from ._placement import convert_step_on_mesh, is_explicit, place, place_like, varying_axes
from ._scan import ShardedScan


def axis_names(axis: AxisName | None) -> tuple[str, ...]:
    """The names, one or several, or none."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis


@dataclasses.dataclass(frozen=True)
class OnMesh(OneDevice):
    """A sequence on one device of a mesh, along which its arrays may vary all the same: a batch is
    sharded."""

    def place_like(self, tree, like):
        return place_like(tree, like)

    def spread(self, tree, index):
        # On explicit axes, JAX 0.10.2 does not find out where the result of a selection lies if
        # only the index has an axis of the mesh.
        if not is_explicit(jax.sharding.get_abstract_mesh()):
            return tree
        always = index == index
        return jtu.tree_map(lambda x: jnp.where(always, x, x), tree)

    def convert_step(self, step, xs, init, data):
        axes = varying_axes(data)
        converted, out, axes = convert_step_on_mesh(step, xs, init, axes)
        return converted, out, place(data, axes)

    def raiser(self, tree, failed, index, messages):
        # On all devices or on none: one that stops alone leaves the others waiting for it.
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:  # of automatic axes only the types tell
            mesh = jax.typeof(jtu.tree_leaves(tree)[0]).sharding.mesh
        some = jax.lax.stop_gradient(eqxi.unvmap_any(failed))
        index = jax.lax.stop_gradient(eqxi.unvmap_max(index))
        if is_explicit(mesh):  # JAX 0.10.2 has no way to raise there under `vmap`
            print_it = functools.partial(_print_message, messages)
            jax.lax.cond(some, lambda: jax.debug.callback(print_it, index), lambda: None)
            return some, None
        if mesh.manual_axes:
            some, index = jax.lax.pmax((some.astype(index.dtype), index), mesh.manual_axes)
            some = some > 0

        def error(some, index):
            return eqx.branched_error_if(jnp.asarray(False), some, index, messages)

        others = set(mesh.axis_names) - set(mesh.manual_axes)
        if others:
            everywhere = jax.sharding.PartitionSpec()
            error = jax.shard_map(
                error, mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names=others
            )
        return some, lambda: error(some, index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeShards(OnMesh):
    """Shards of equal length along the manual `axis` of a mesh."""

    axis: AxisName  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]

    @property
    def is_sharded(self) -> bool:
        return True

    @property
    def count(self) -> int:
        return jax.lax.axis_size(self.axis)

    @property
    def index(self) -> Int[Array, ""] | int:
        index = jax.lax.axis_index(self.axis).astype(int)
        return self.count - 1 - index if self.reverse else index

    @property
    def is_first(self) -> Bool[Array, ""] | bool:
        return self.index == 0

    def positions(self, rows: int) -> Int[Array, " rows"]:
        return self.index * rows + jnp.arange(rows)

    # --- exchange between neighbours ----------------------------------------------------------

    def shift_from_prev(self, tree, first):
        step = -1 if self.reverse else 1
        devices = range(self.count)
        pairs = [(i, i + step) for i in devices if i + step in devices]
        moved = _packed(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)
        return bool_where(jnp.asarray(self.is_first), first, moved)

    def shift_right(self, rows, first=None):
        first = jtu.tree_map(lambda x: jnp.zeros_like(x[0]), rows) if first is None else first
        first = self.shift_from_prev(jtu.tree_map(lambda x: x[-1], rows), first)
        return previous_states(first, rows)

    # --- reductions over all devices ----------------------------------------------------------

    def all_gather(self, tree):
        gathered = jtu.tree_map(self._all_gather, tree)
        return flip_time(gathered) if self.reverse else gathered

    def _all_gather(self, x: Array) -> Array:
        if not is_explicit(jax.sharding.get_abstract_mesh()):
            return jax.lax.all_gather(x, self.axis)
        # JAX 0.10.2 mistakes the axes of a batched `all_gather` where another axis is explicit.
        index = jnp.arange(self.count) == jax.lax.axis_index(self.axis).astype(int)
        x = jnp.expand_dims(x, 0)
        return self._select_from(over_rows(index, x), x)

    def _select_from(self, selected: Bool[Array, "..."] | bool, x: Array) -> Array:
        """`x` of the one device on which `selected` holds."""
        number = _as_number(x)
        found = jax.lax.psum(jnp.where(selected, number, jnp.zeros_like(number)), self.axis)
        return found.astype(x.dtype)

    def reduce(self, maxima, sums):
        local, m = self._stacked([*maxima, *sums]), len(maxima)
        rows = place_like(self.all_gather(local), local)
        return Reduced(list(jnp.max(rows[:, :m], axis=0)), list(jnp.sum(rows[:, m:], axis=0)))

    def _stacked(self, numbers: Sequence[Float[Array, ""]]) -> Float[Array, " n"]:
        # On explicit axes JAX stacks only arrays of the same sharding.
        known = functools.reduce(jnp.logical_and, [x == x for x in numbers])
        return jnp.stack([self.spread(x, known) for x in numbers])

    def any(self, flag):
        return self.pmax(_as_number(flag)) > 0

    def pmax(self, x):
        return place_like(jax.lax.pmax(x, self.axis), x)

    def psum(self, x):
        return place_like(jax.lax.psum(x, self.axis), x)

    def from_first(self, tree):
        return self.backwards().from_last(tree)

    def from_last(self, tree):
        is_last = self.index == self.count - 1
        return jtu.tree_map(lambda x: self._select_from(is_last, x), tree)

    def replicate(self, tree):
        def one(x):
            if not varying_axes(x) & frozenset(axis_names(self.axis)):
                return x
            return jax.lax.pmax(_as_number(x), self.axis).astype(x.dtype)

        return jtu.tree_map(one, tree)

    def sequenced_after(self, x, other):
        return jnp.maximum(x, -other)

    def sharded(self, scan):
        return ShardedScan(scan, self)

    # --- control flow -------------------------------------------------------------------------

    def while_loop(self, unfinished, turn, carry):
        # XLA waits for all devices of the mesh. So where other sequences lie along another axis,
        # the loop turns until all are finished, and what is finished stays as it is.
        axes = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
        if axes <= frozenset(axis_names(self.axis)):
            return jax.lax.while_loop(unfinished, turn, carry)

        def anywhere(carry):
            flag = place(unfinished(carry).astype(np.int32), axes)
            return jax.lax.pmax(flag, tuple(axes)) > 0

        def turned(carry):
            return place_like(bool_where(unfinished(carry), turn(carry), carry), carry)

        return jax.lax.while_loop(anywhere, turned, carry)


def _print_message(messages, index):
    print(messages[int(index)], flush=True)


def _as_number(x: Array) -> Array:
    """A flag as 0 or 1: collectives take no flags."""
    return x.astype(np.int32) if x.dtype == bool else x


def _packed(exchange: Callable[[Array], Array], tree: PyTree[Array]) -> PyTree[Array]:
    """An exchange of all leaves of a dtype at once."""
    leaves, treedef = jtu.tree_flatten(tree)
    if is_explicit(jax.sharding.get_abstract_mesh()):  # JAX joins only arrays of the same sharding
        return treedef.unflatten(map(exchange, leaves))
    exchanged: dict[int, Array] = {}
    for dtype in {x.dtype: None for x in leaves}:
        vector, unravel = ravel_pytree({i: x for i, x in enumerate(leaves) if x.dtype == dtype})
        exchanged |= unravel(exchange(vector))
    return treedef.unflatten([exchanged[i] for i in range(len(leaves))])
