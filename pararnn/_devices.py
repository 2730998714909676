"""Arrays that lie on several devices: what their types say beyond shapes and dtypes.

Inside `jax.shard_map` an array *varies* along some axes of the mesh, or is the same along them, and
what a loop carries must not begin as the one and become the other. On a mesh with explicit axes
the type of an array names its mesh, and every constant must be made on it. Both hold for the
steps of a recurrence too: a step is traced for the arrays that it will meet.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from ._misc import num_steps, time_slice

_T = TypeVar("_T")


def _arrays(tree: PyTree[Any]) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def is_explicit(mesh: Any) -> bool:
    """Whether any axis of the mesh is explicit."""
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def mesh_context(tree: PyTree[Any]) -> contextlib.AbstractContextManager[Any]:
    """A context in which constants are made on the mesh of the arrays, if its axes are explicit and
    no mesh is set. JAX would refuse to combine them otherwise."""
    if jax.sharding.get_abstract_mesh().empty:
        for sharding in map(_type_sharding, jtu.tree_leaves(tree)):
            if isinstance(sharding, jax.sharding.NamedSharding) and is_explicit(sharding.mesh):
                return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def _type_sharding(x: Any) -> Any:
    """What the type of an array, or of the description of one, says of where it lies."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    return jax.typeof(x).sharding if eqx.is_array(x) else None


def varying_axes(tree: PyTree[Any]) -> frozenset[Any]:
    """The manual axes of the mesh along which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in _arrays(tree)))


def place(tree: PyTree[Any], axes: frozenset[Any]) -> PyTree[Any]:
    """The same values, each array of a type that varies along `axes`, on the mesh that is set."""
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
    """The same values, of a type that varies along all axes along which any array of `like` does.
    For the constants that a loop starts from: what a loop carries keeps its type."""
    return place(tree, varying_axes(like))


def once_where(
    pending: Bool[Array, ""],
    value: _T,
    turn: Callable[[_T], _T],
    scope: str,
    loop: Callable[..., Any] = jax.lax.while_loop,
) -> _T:
    """The `value`, or where it is `pending` what `turn` makes of it. A `loop` of one turn or none,
    named `scope`: under `vmap`, a `cond` would run both branches, and copy for each sequence what
    they close over."""

    carry = place_like((pending, value), (pending, value))

    def body(carry):
        return place_like((jnp.zeros_like(carry[0]), turn(carry[1])), carry)

    with jax.named_scope(scope):
        return loop(lambda carry: carry[0], body, carry)[1]


def spread(tree: PyTree[Array], index: Array) -> PyTree[Array]:
    """The same values, differing under `vmap` wherever the scalar `index` does, which is to select
    among them. On explicit axes JAX does not find out where the result of such a selection lies if
    only the index has an axis of the mesh."""
    if not is_explicit(jax.sharding.get_abstract_mesh()):
        return tree
    always = index == index
    return jtu.tree_map(lambda x: jnp.where(always, x, x), tree)


def raiser(
    tree: PyTree[Array], failed: Bool[Array, ""], index: Int[Array, ""], messages: Sequence[str]
) -> tuple[Bool[Array, ""], Callable[[], Bool[Array, ""]] | None]:
    """`(some, error)`: whether `failed` holds anywhere, the same on all devices; and a function
    that then raises `messages[index]` at run time, and else returns False.

    On all devices or on none: one that stops alone leaves the others waiting for it. Where the axes
    of the mesh on which `tree` lies are explicit, JAX has no way to do so under `vmap`: there the
    message is printed, and `error` is None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:  # of automatic axes only the types tell
        mesh = jax.typeof(jtu.tree_leaves(tree)[0]).sharding.mesh
    some = jax.lax.stop_gradient(eqxi.unvmap_any(failed))
    index = jax.lax.stop_gradient(eqxi.unvmap_max(index))
    if is_explicit(mesh):
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


def _print_message(messages, index):
    print(messages[int(index)], flush=True)


def typed_struct(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes, and what else the types of the arrays say."""
    return typed_result(lambda tree: tree, tree)


def typed_slice(xs: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """As `typed_struct`, without the leading axis."""
    if num_steps(xs) == 0:
        return time_slice(xs)
    return typed_result(lambda xs: jtu.tree_map(lambda x: x[0], xs), xs)


def typed_result(
    fn: Callable[[PyTree[Any]], PyTree[Array]], tree: PyTree[Any]
) -> PyTree[jax.ShapeDtypeStruct]:
    """What `fn(tree)` returns, as by `jax.eval_shape`; which however leaves the mesh out if some of
    its axes are manual and the others automatic."""
    shardings = map(_type_sharding, jtu.tree_leaves(tree))
    meshes = [s.mesh for s in shardings if s is not None and not s.mesh.empty]

    def complete(new):
        kind = new.manual_axis_type
        if new.sharding is not None or kind is None or not kind.varying:
            return new
        sharding = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=sharding, manual_axis_type=kind)

    return jtu.tree_map(complete, jax.eval_shape(fn, tree))


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
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
    xs: PyTree[Array],
    init: PyTree[Array],
    axes: frozenset[Any],
) -> tuple[ConvertedStep, PyTree[Any], frozenset[Any]]:
    """`(converted, out, axes)`: a step that takes and returns arrays which all vary along the same
    manual `axes` of the mesh, so that a loop may carry its state from any beginning; the shapes and
    dtypes that it returns; and the axes: those given, and what the step adds by itself."""
    while True:

        def uniform(state, x, axes=axes):
            return place(step(state, x), axes)

        example = place((init, xs), axes)
        closed, out, static = eqx.filter_make_jaxpr(uniform)(
            typed_struct(example[0]), typed_slice(example[1])
        )
        found = frozenset().union(*(x.manual_axis_type.varying for x in closed.out_avals))
        if found <= axes:
            consts = [_adopted(x) for x in closed.consts]
            converted = ConvertedStep(closed.jaxpr, consts, jtu.tree_structure(out))
            return converted, eqx.combine(out, static), axes
        axes = found | axes


def _adopted(x: Any) -> Any:
    """The same values, of a type that names the mesh as it is here. What is closed over inside
    `jax.shard_map` keeps the type that it has outside, where no axis is manual, and a loop with it
    cannot be transposed. The result of any operation has the right one."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or not eqx.is_array(x) or jax.typeof(x).sharding.mesh == mesh:
        return x
    return jnp.where(True, x, x)
