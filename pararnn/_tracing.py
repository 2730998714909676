"""Tracing with abstract arrays: their shapes and dtypes, and what their types say of a mesh."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex_core
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._misc import num_steps, struct, time_slice


def type_sharding(x: Any) -> Any:
    """The sharding in the type of an array or of a `jax.ShapeDtypeStruct`; `None` for others."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    return jax.typeof(x).sharding if eqx.is_array(x) else None


def mesh_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding of an array or of a `jax.ShapeDtypeStruct` on a mesh, if any."""
    traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def on_mesh(tree: PyTree[Any]) -> bool:
    """Whether a mesh is set, or any array lies on one."""
    if not jax.sharding.get_abstract_mesh().empty:
        return True
    shardings = map(mesh_sharding, jtu.tree_leaves(tree))
    return any(sharding is not None and not sharding.mesh.empty for sharding in shardings)


def typed_struct(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes, and what else the types of the arrays say."""
    return typed_result(lambda tree: tree, tree) if on_mesh(tree) else struct(tree)


def typed_slice(xs: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Like `typed_struct`, without the leading axis."""
    if num_steps(xs) == 0 or not on_mesh(xs):
        return time_slice(xs)
    return typed_result(lambda xs: jtu.tree_map(lambda x: x[0], xs), xs)


def typed_result(
    fn: Callable[[PyTree[Any]], PyTree[Array]], tree: PyTree[Any]
) -> PyTree[jax.ShapeDtypeStruct]:
    """The result of `fn(tree)` as by `jax.eval_shape`, which however leaves the mesh out if some of
    its axes are manual and the others automatic (JAX 0.10.2)."""
    result = jax.eval_shape(fn, tree)
    if not on_mesh(tree):
        return result
    shardings = map(type_sharding, jtu.tree_leaves(tree))
    meshes = [s.mesh for s in shardings if s is not None and not s.mesh.empty]

    def complete(new):
        kind = new.manual_axis_type
        if new.sharding is not None or kind is None or not kind.varying:
            return new
        sharding = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=sharding, manual_axis_type=kind)

    return jtu.tree_map(complete, result)


class ConvertedStep(eqx.Module):
    """A step with all arrays that it closes over as leaves of its own.

    As what `equinox.filter_closure_convert` makes, which however refuses arguments that lie on
    other devices than its examples.
    """

    jaxpr: Any  # a leaf, though not an array
    consts: list[Any]
    treedef: Any = eqx.field(static=True)  # of the state

    def __call__(self, state: PyTree[Array], x: PyTree[Array]) -> PyTree[Array]:
        closed = jex_core.ClosedJaxpr(self.jaxpr, self.consts)
        out = jex_core.jaxpr_as_fun(closed)(*jtu.tree_leaves((state, x)))
        return jtu.tree_unflatten(self.treedef, out)


def convert_step(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]], init: PyTree[Any], x: PyTree[Any]
) -> tuple[ConvertedStep, PyTree[Any], frozenset[Any]]:
    """`(converted, out, axes)`: the step with all that it closes over as leaves; the shapes and
    dtypes that it returns; and the manual axes of the mesh along which these vary.

    **Arguments:**

    - `init`, `x`: a state and one input, as arrays or as `jax.ShapeDtypeStruct`.
    """
    closed, out, static = eqx.filter_make_jaxpr(step)(init, x)
    axes = frozenset().union(*(x.manual_axis_type.varying for x in closed.out_avals))
    converted = ConvertedStep(closed.jaxpr, closed.consts, jtu.tree_structure(out))
    return converted, eqx.combine(out, static), axes
