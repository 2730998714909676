"""Running a function on the devices along an axis of a mesh, each with a part of the sequence."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Bool, PyTree

from .._misc import num_steps
from .._one_device import AxisName
from .._tracing import mesh_sharding
from ._time import axis_names

# Longer parts that must be filled up anyway are filled up to a multiple of this, so that they can
# be cut into chunks.
_ROUND = 64


class TimeAxis(NamedTuple):
    """An axis of a mesh along which time is cut.

    - `axis`: its name.
    - `mesh`: to be mapped over; `None` where that has been done: then each device runs the code for
        its own part already.
    - `manual`: which axes of the mesh the mapping takes away from JAX's own partitioning.
    """

    axis: AxisName
    mesh: Mesh | AbstractMesh | None
    manual: frozenset[Any] = frozenset()

    @property
    def devices(self) -> int:
        """The number of devices along the axis."""
        if self.mesh is None:
            return jax.lax.axis_size(self.axis)
        return math.prod(self.mesh.shape[name] for name in axis_names(self.axis))

    def part_length(self, length: int) -> int:
        """The number of steps of a shard, of `length` steps in all."""
        steps = math.ceil(length / self.devices)
        if length % self.devices and steps > _ROUND:
            steps = math.ceil(steps / _ROUND) * _ROUND
        return steps


def is_manual(axis: AxisName | None) -> bool:
    """Whether the code runs on each device along the axis already."""
    names = set(axis_names(axis))
    return bool(names) and names <= set(jax.sharding.get_abstract_mesh().manual_axes)


def both(mask: Any, real: Bool[Array, " part"] | None) -> Any:
    """The conjunction of a user's mask and that of the real steps, either of which may be None."""
    if mask is None or real is None:
        return real if mask is None else mask
    return mask & real


def find_time_axis(axis: AxisName, tree: PyTree[Any]) -> TimeAxis:
    """The axis of that name, of the mesh that is set or of that on which the arrays of `tree` lie.

    Raises a `ValueError` if there is none.
    """
    names = frozenset(axis_names(axis))
    mesh = jax.sharding.get_abstract_mesh()
    if is_manual(axis):
        return TimeAxis(axis, None)
    shardings = map(mesh_sharding, jtu.tree_leaves(tree))
    meshes = [mesh, *(sharding.mesh for sharding in shardings if sharding is not None)]
    meshes = [mesh for mesh in meshes if not mesh.empty]
    for mesh in meshes:
        if names and names <= set(mesh.axis_names):
            return TimeAxis(axis, mesh, _manual_axes(mesh, names, tree))
    found = f"the mesh has the axes {meshes[0].axis_names}" if meshes else "there is no mesh"
    raise ValueError(
        f"`solver=TimeSharded({axis!r}, …)` needs a mesh with this axis, but {found}. Make one "
        "with `jax.make_mesh`, and set it (`with jax.set_mesh(mesh):`) or place the inputs on it."
    )


def time_axis_of(xs: PyTree[Any]) -> AxisName | None:
    """The axis over which the steps of a sequence are sharded, as far as that can be told."""
    for x in jtu.tree_leaves(xs):
        sharding = mesh_sharding(x)
        if sharding is not None and sharding.spec and sharding.spec[0] is not None:
            return sharding.spec[0]
    return None


def over_devices(
    time: TimeAxis,
    function: Callable[[Any, Any, Bool[Array, " part"] | None], tuple[Any, Any]],
    cut: PyTree[Any],
    whole: PyTree[Any],
) -> tuple[Any, Any]:
    """`function(cut, whole, real)` on each device.

    **Arguments:**

    - `function`: it gets the part of `cut` that lies on the device, all of `whole`, and which steps
        are real, or `None` if all are. It may close over arrays.
    - `cut`: a pytree of arrays that share their leading axis, time, of any length but 0. What the
        number of devices does not divide, is filled up with copies of the last step.
    - `whole`: a pytree of arrays.

    **Returns:**

    What it returns: a pytree of parts, joined; and a pytree of arrays that are the same on all
    devices.
    """
    length, part = num_steps(cut), time.part_length(num_steps(cut))
    surplus = part * time.devices - length
    real = None
    if surplus:
        cut = jtu.tree_map(lambda x: _filled(x, surplus), cut)
        real = jnp.arange(length + surplus) < length
    along, everywhere = PartitionSpec(time.axis), PartitionSpec()
    joined, same = jax.shard_map(
        lambda parts, whole: function(parts[0], whole, parts[1]),
        mesh=time.mesh,
        in_specs=(along, everywhere),
        out_specs=(along, everywhere),
        axis_names=set(time.manual),
        check_vma=False,
    )(_laid((cut, real), time), whole)
    if surplus:
        joined = jtu.tree_map(lambda x: _gathered(x, time)[:length], joined)
    return joined, same


def _manual_axes(mesh: Mesh | AbstractMesh, names: frozenset[str], tree: Any) -> frozenset[Any]:
    """The axes to map over: those of time. A `jax.vmap(..., spmd_axis_name=...)` around this adds
    the axis of its batch, which must not be left to automatic partitioning then. JAX 0.10.2 has no
    query for this, so a dummy `jax.shard_map` is traced and its error caught."""
    tracers = [x for x in jtu.tree_leaves(tree) if isinstance(x, jax.core.Tracer)]
    if not tracers:
        return names
    number = sum(jnp.sum(jax.lax.stop_gradient(x) != x) for x in tracers)
    everywhere = PartitionSpec()
    trial = jax.shard_map(
        lambda x: x + 0, mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names=set(names)
    )
    try:
        trial(number)
    except ValueError:
        return frozenset(mesh.axis_names)
    return names


def _is_explicit(time: TimeAxis) -> bool:
    assert time.mesh is not None
    kinds = dict(zip(time.mesh.axis_names, time.mesh.axis_types, strict=True))
    return any(kinds[name] == AxisType.Explicit for name in axis_names(time.axis))


def _filled(x: Array, surplus: int) -> Array:
    return jnp.concatenate([x, jnp.broadcast_to(x[-1:], (surplus, *x.shape[1:]))])


def _laid(tree: PyTree[Array], time: TimeAxis) -> PyTree[Array]:
    """The arrays resharded along time, which explicit axes need to be told."""
    return jtu.tree_map(lambda x: _resharded(x, time.axis), tree) if _is_explicit(time) else tree


def _gathered(x: Array, time: TimeAxis) -> Array:
    """An explicit axis must divide the length of whatever it shards."""
    return _resharded(x, None) if _is_explicit(time) else x


def _resharded(x: Array, axis: AxisName | None) -> Array:
    return jax.reshard(x, PartitionSpec(axis, *jax.typeof(x).sharding.spec[1:]))
