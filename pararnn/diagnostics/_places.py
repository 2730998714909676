"""Where the runs of a benchmark happen: on one device, or on the devices of a mesh."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import PyTree

from .._misc import num_steps
from .._one_device import AxisName
from ..adjoints import AbstractAdjoint
from ..sharding._mesh import TimeAxis, find_time_axis, time_axis_of
from ..sharding._placement import mesh_context
from ..solvers import AbstractSolver
from ._problem import AnyRecurrence, Problem, make_problem

Policy = AbstractSolver | AbstractAdjoint


class Places(NamedTuple):
    """One device for what treats time as one piece, and meshes for what cuts it.

    - `meshes`: by the axis along which time is cut; none if nobody asks for any, and then all stays
        where it is.
    - `lies`: the axis along which the inputs lie, `None` if they do not.
    """

    meshes: dict[AxisName, Mesh]
    lies: AxisName | None

    def one_device(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which programs are for one device, whatever mesh is set."""
        if not self.meshes:
            return contextlib.nullcontext()
        return jax.set_mesh(Mesh(np.empty((), object), ()))

    def on_one(self, tree: PyTree[Any]) -> PyTree[Any]:
        """The same with all arrays on one device, the first of a mesh."""
        if not self.meshes:
            return tree
        device = next(iter(self.meshes.values())).devices.flat[0]
        return _moved(tree, SingleDeviceSharding(device))

    def along(self, axis: AxisName, args: tuple[Any, Any, Any]) -> tuple[Mesh, tuple[Any, ...]]:
        """The mesh with that axis, and `(step, us, init)` on it: the inputs cut along it, as far as
        its devices divide their length, and the rest on all of them."""
        mesh, (step, us, init) = self.meshes[axis], args
        whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(axis))
        if num_steps(us) % TimeAxis(axis, mesh).devices:
            cut = whole
        return mesh, (_moved(step, whole), _moved(us, cut), _moved(init, whole))


def find_places(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None,
    solvers: Sequence[AbstractSolver | None],
) -> Places:
    """Where to run what is measured: from where the inputs lie, the solvers, and the layer."""
    with mesh_context((xs, init, recurrence)):
        problem = make_problem(recurrence, xs, init, abstract=True)
    lies = time_axis_of(problem.xs)
    axes = [axis_of(problem.solver, problem.adjoint), *map(axis_of, solvers), lies]
    return Places({axis: _mesh_with(axis, problem) for axis in axes if axis is not None}, lies)


def axis_of(*policies: Policy | None) -> AxisName | None:
    """The axis along which the first of them that names one cuts time."""
    axes = (policy.axis for policy in policies if policy is not None)
    return next((axis for axis in axes if axis is not None), None)


def _mesh_with(axis: AxisName, problem: Problem) -> Mesh:
    mesh = find_time_axis(axis, (problem.xs, (problem.layer, problem.state))).mesh
    if isinstance(mesh, AbstractMesh):  # that of the context, where JAX knows the devices too
        mesh = jax.sharding.get_mesh()
    if mesh is None or mesh.empty:
        raise ValueError(
            f"To measure what cuts time along {axis!r} takes a mesh of devices, outside of "
            "`jax.shard_map`; got one without: set one with `jax.set_mesh`."
        )
    return mesh


def _moved(tree: PyTree[Any], place: Sharding) -> PyTree[Any]:
    return jtu.tree_map(lambda x: jax.device_put(x, place) if eqx.is_array(x) else x, tree)
