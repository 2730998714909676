"""Placement of the runs of a benchmark: on one device, or on the devices of a mesh."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from .._misc import num_steps
from .._one_device import AxisName
from ..adjoints import AbstractAdjoint
from ..sharding._mesh import TimeAxis, find_time_axis, time_axis_of
from ..sharding._placement import mesh_context
from ..solvers import AbstractSolver
from ._arguments import AnyRecurrence, SolveArguments, solve_arguments


class Placement(NamedTuple):
    """One device for programs that do not shard time, and meshes for those that do.

    - `meshes`: by the axis over which time is sharded; empty if nothing shards time, and then all
        arrays stay where they are.
    - `axis`: the axis over which the inputs are sharded, or `None`.
    """

    meshes: dict[AxisName, Mesh]
    axis: AxisName | None

    def one_device(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which programs run on one device, whatever mesh is set."""
        if not self.meshes:
            return contextlib.nullcontext()
        return jax.set_mesh(Mesh(np.empty((), object), ()))

    def on_one(self, tree: PyTree[Any]) -> PyTree[Any]:
        """The tree with all arrays on one device, the first of a mesh."""
        if not self.meshes:
            return tree
        device = next(iter(self.meshes.values())).devices.flat[0]
        return _put(tree, SingleDeviceSharding(device))

    def on_mesh(self, axis: AxisName, args: tuple[Any, Any, Any]) -> tuple[Mesh, tuple[Any, ...]]:
        """The mesh with that axis, and `(step, us, init)` on it: the inputs sharded over the axis
        if its size divides their length, everything else replicated."""
        mesh, (step, us, init) = self.meshes[axis], args
        replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(axis))
        if num_steps(us) % TimeAxis(axis, mesh).devices:
            sharded = replicated
        return mesh, (_put(step, replicated), _put(us, sharded), _put(init, replicated))


def find_placement(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None,
    solvers: Sequence[AbstractSolver | None],
) -> Placement:
    """The placement that the inputs, the solvers and the layer ask for."""
    with mesh_context((xs, init, recurrence)):
        arguments = solve_arguments(recurrence, xs, init, abstract=True)
    own = time_axis_of(arguments.xs)
    axes = [sharded_axis(arguments.solver, arguments.adjoint), *map(sharded_axis, solvers), own]
    return Placement({axis: _mesh_with(axis, arguments) for axis in axes if axis is not None}, own)


def sharded_axis(*policies: AbstractSolver | AbstractAdjoint | None) -> AxisName | None:
    """The axis over which the first policy that names one shards time."""
    axes = (policy.axis for policy in policies if policy is not None)
    return next((axis for axis in axes if axis is not None), None)


def _mesh_with(axis: AxisName, arguments: SolveArguments) -> Mesh:
    mesh = find_time_axis(axis, (arguments.xs, (arguments.layer, arguments.state))).mesh
    if isinstance(mesh, AbstractMesh):  # that of the context, where JAX knows the devices too
        mesh = jax.sharding.get_mesh()
    if mesh is None or mesh.empty:
        raise ValueError(
            f"To measure what cuts time along {axis!r} takes a mesh of devices, outside of "
            "`jax.shard_map`; got one without: set one with `jax.set_mesh`."
        )
    return mesh


def _put(tree: PyTree[Any], sharding: Any) -> PyTree[Any]:
    return jtu.tree_map(lambda x: jax.device_put(x, sharding) if eqx.is_array(x) else x, tree)
