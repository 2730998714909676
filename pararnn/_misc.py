"""Pytrees and vectors, for every other room to use."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree


def is_complex(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


def _to_real(leaf: Any) -> Any:
    return (leaf.real, leaf.imag) if is_complex(leaf) else leaf


def real_leaves(tree: PyTree[Array]) -> list[Array]:
    """The leaves, a complex one as its real part, then its imaginary part."""
    return jtu.tree_leaves(jtu.tree_map(_to_real, tree))


def make_ravel(
    state: PyTree[Any],
) -> tuple[
    Callable[[PyTree[Array]], Float[Array, " size"]],
    Callable[[Float[Array, " size"]], PyTree[Array]],
    int,
    np.dtype,
]:
    """Two inverse maps between a state and a vector of *real* numbers.

    Leaves follow each other in the order of `jax.tree_util`; a complex leaf contributes its real
    part, then its imaginary part, because the Jacobian of a step need not be complex-linear.
    Both maps are linear, hence they serve tangents and cotangents too.

    **Arguments:**

    - `state`: a pytree of inexact arrays or of `jax.ShapeDtypeStruct`.

    **Returns:**

    `(ravel, unravel, size, dtype)`.
    """
    leaves, treedef = jtu.tree_flatten(state)
    dtypes = [leaf.dtype for leaf in leaves]
    real_dtypes = {jnp.finfo(d).dtype for d in dtypes}
    if len(real_dtypes) > 1:
        real_dtypes = {np.dtype("float64" if np.dtype("float64") in real_dtypes else "float32")}
    (wide,) = real_dtypes or {np.dtype("float32")}
    if len(leaves) == 1 and not is_complex(leaves[0]):  # a third of the operations
        (leaf,) = leaves

        def ravel_leaf(state):
            return jnp.reshape(jtu.tree_leaves(state)[0].astype(wide), -1)

        def unravel_leaf(vector):
            return treedef.unflatten([jnp.reshape(vector, leaf.shape).astype(leaf.dtype)])

        return ravel_leaf, unravel_leaf, math.prod(leaf.shape), wide
    example = [_to_real(np.zeros(leaf.shape, leaf.dtype)) for leaf in leaves]
    flat, unravel_real = jfu.ravel_pytree(jtu.tree_map(lambda x: x.astype(wide), example))

    def ravel(state):
        return jfu.ravel_pytree([x.astype(wide) for x in real_leaves(state)])[0]

    def unravel(vector):
        parts = [jax.lax.complex(*p) if isinstance(p, tuple) else p for p in unravel_real(vector)]
        parts = [p.astype(dtype) for p, dtype in zip(parts, dtypes, strict=True)]
        return jtu.tree_unflatten(treedef, parts)

    return ravel, unravel, flat.size, flat.dtype


def num_steps(xs: PyTree[Any]) -> int:
    """The length of the leading axis that the leaves of `xs` share."""
    return jtu.tree_leaves(xs)[0].shape[0]


def is_symbolic(length: Any) -> bool:
    """Whether it is no number yet, as the sizes of an export with `jax.export.symbolic_shape`."""
    return jax.export.is_symbolic_dim(length)


def time_slice(xs: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `xs` without the leading axis."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def struct(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a pytree of arrays."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def previous_states(init: PyTree[Array] | None, states: PyTree[Array]) -> PyTree[Array]:
    """`(init, states[0], …, states[L-2])`: the state that each step starts from; `None` is zero."""
    if init is None:

        def pad(h):
            widths = [(1, -1, 0)] + [(0, 0, 0)] * (h.ndim - 1)
            return jax.lax.pad(h, jnp.zeros((), h.dtype), widths)

        return jtu.tree_map(pad, states)
    return jtu.tree_map(
        lambda h0, h: jnp.concatenate([jnp.expand_dims(h0, 0), h[:-1]]), init, states
    )


def or_zeros(tangents: PyTree[Array | None], values: PyTree[Array]) -> PyTree[Array]:
    """The derivatives that go with `values`, zero where they are left out as `None`.

    Led by `values`: a `None` in there is a part of the tree, not a derivative.
    """
    return jtu.tree_map(lambda x, t: jnp.zeros_like(x) if t is None else t, values, tangents)


def flip_time(tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: jnp.flip(x, 0), tree)


def over_rows(flags: Bool[Array, "..."], like: Array) -> Bool[Array, "..."]:
    """Flags that belong to the leading axes of `like`, to be broadcast over all others."""
    return jnp.reshape(flags, (*flags.shape, *(1,) * (like.ndim - flags.ndim)))


def finite_or(x: Array, otherwise: Array | float) -> Array:
    """The elements that are finite, and those of `otherwise` instead of the others."""
    # Unlike `jnp.where` with a number, a single operation, which compiles sooner.
    if not isinstance(otherwise, jax.Array):
        otherwise = jnp.full_like(x, otherwise)
    return jax.lax.select(jnp.isfinite(x), x, otherwise)


def bool_where(pred: Bool[Array, ""], on_true: PyTree[Array], on_false: PyTree[Array]):
    """Leafwise selection with one boolean."""
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), on_true, on_false)
