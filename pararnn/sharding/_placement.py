"""The types of arrays on a mesh: the axes along which they vary, and explicit axes.

Inside `jax.shard_map` an array *varies* along some axes of the mesh, or is the same along them, and
what a loop carries must not begin as the one and become the other. On a mesh with explicit axes
the type of an array names its mesh, and every constant must be made on it. Both hold for the
steps of a recurrence too: a step is traced for the arrays that it will meet.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._tracing import ConvertedStep, convert_step, type_sharding, typed_slice, typed_struct


def _arrays(tree: PyTree[Any]) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def is_explicit(mesh: Any) -> bool:
    """Whether any axis of the mesh is explicit."""
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def mesh_context(tree: PyTree[Any]) -> contextlib.AbstractContextManager[Any]:
    """A context in which constants are made on the mesh of the arrays, if its axes are explicit and
    no mesh is set. JAX would refuse to combine them otherwise."""
    if jax.sharding.get_abstract_mesh().empty:
        for sharding in map(type_sharding, jtu.tree_leaves(tree)):
            if isinstance(sharding, jax.sharding.NamedSharding) and is_explicit(sharding.mesh):
                return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def varying_axes(tree: PyTree[Any]) -> frozenset[Any]:
    """The manual axes of the mesh along which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in _arrays(tree)))


def place(tree: PyTree[Any], axes: frozenset[Any]) -> PyTree[Any]:
    """The arrays with types that vary along `axes`, on the mesh that is set."""
    on_mesh = is_explicit(jax.sharding.get_abstract_mesh())

    def one(x):
        if not eqx.is_array(x):
            return x
        if on_mesh and jax.typeof(x).sharding.mesh.empty:
            x = jax.reshard(x, jax.sharding.PartitionSpec())
        missing = tuple(axes - varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jtu.tree_map(one, tree)


def place_like(tree: PyTree[Any], like: PyTree[Any]) -> PyTree[Any]:
    """The arrays with types that vary along all axes along which any array of `like` does.
    For the constants that a loop starts from: what a loop carries keeps its type."""
    return place(tree, varying_axes(like))


def convert_step_on_mesh(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
    xs: PyTree[Array],
    init: PyTree[Array],
    axes: frozenset[Any],
) -> tuple[ConvertedStep, PyTree[Any], frozenset[Any]]:
    """Like `convert_step`, for a step that takes and returns arrays which all vary along the same
    manual `axes` of the mesh, so that a loop may carry its state from any beginning: those given,
    and those that the step adds by itself."""
    while True:

        def uniform(state, x, axes=axes):
            return place(step(state, x), axes)

        example = place((init, xs), axes)
        converted, out, found = convert_step(
            uniform, typed_struct(example[0]), typed_slice(example[1])
        )
        if found <= axes:
            consts = [_adopted(x) for x in converted.consts]
            return ConvertedStep(converted.jaxpr, consts, converted.treedef), out, axes
        axes = found | axes


def _adopted(x: Any) -> Any:
    """The array with a type that names the current mesh. An array that is closed over inside
    `jax.shard_map` keeps the type that it has outside, where no axis is manual (JAX 0.10.2), and a
    loop with it cannot be transposed. The result of any operation has the right type."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or not eqx.is_array(x) or jax.typeof(x).sharding.mesh == mesh:
        return x
    return jnp.where(True, x, x)
