"""Pytree, dtype and norm helpers that every other room may use."""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, PyTree


def is_complex(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


def _to_real(leaf: Any) -> Any:
    return (leaf.real, leaf.imag) if is_complex(leaf) else leaf


def real_leaves(tree: PyTree[Array]) -> list[Array]:
    """The leaves, a complex one as its real part, then its imaginary part."""
    return jtu.tree_leaves(jtu.tree_map(_to_real, tree))


def raveler(
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


def time_slice(xs: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `xs` without the leading axis."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def struct(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a pytree of arrays."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def previous_states(init: PyTree[Array], states: PyTree[Array]) -> PyTree[Array]:
    """`(init, states[0], …, states[L-2])`: the state that each step starts from."""
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


def bool_where(pred: Bool[Array, ""], on_true: PyTree[Array], on_false: PyTree[Array]):
    """Leafwise selection with one boolean."""
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), on_true, on_false)


def all_finite(tree: PyTree[Array], *, keep_axes: int = 0) -> Bool[Array, "..."]:
    """Whether every element is finite, reduced over all but the first `keep_axes` axes."""
    flags = [
        jnp.all(jnp.isfinite(x), axis=tuple(range(keep_axes, x.ndim)))
        for x in jtu.tree_leaves(tree)
    ]
    return jnp.all(jnp.stack(flags), axis=0)


def default_rtol(dtype: Any) -> float:
    """`eps ** 0.8`: about 24 ulps in float32, 1300 in float64, 3 in bfloat16.

    A tolerance near one ulp never settles, because the iteration's own rounding moves the states
    by a few; the exponent below one leaves the wide types room for the conditioning of the system.
    """
    return float(jnp.finfo(dtype).eps) ** 0.8


def alignment(
    a: PyTree[Inexact[Array, "..."]], b: PyTree[Inexact[Array, "..."]]
) -> Float[Array, ""]:
    """The largest cosine between corresponding leaves; 0 for a leaf that is zero in either."""

    def cosine(x, y):
        # Scaled to a largest magnitude of 1, so that the squares neither overflow nor vanish.
        x, y = (v / jnp.maximum(jnp.max(jnp.abs(v)), 1e-30).astype(v.dtype) for v in (x, y))
        squares = jnp.sum(jnp.abs(x) ** 2) * jnp.sum(jnp.abs(y) ** 2)
        product = jnp.real(jnp.vdot(x, y))
        return jnp.where(squares > 0, product / jnp.sqrt(jnp.maximum(squares, 1e-30)), 0.0)

    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    cosines = [cosine(x, y).astype(jnp.float32) for x, y in pairs if x.size]
    return jnp.max(jnp.stack(cosines), initial=-1.0) if cosines else jnp.zeros((), jnp.float32)


def agreement_tolerance(dtype: Any) -> float:
    """The relative error within which two ways to solve a recurrence count as agreeing."""
    return {"float32": 1e-5, "float64": 1e-10}.get(jnp.dtype(dtype).name, 10 * default_rtol(dtype))


def relative_error(got: PyTree[Array], expected: PyTree[Array]) -> float:
    """The largest difference of any leaf, relative to that leaf's largest magnitude; `inf` if any
    is not finite."""
    worst = 0.0
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        a, b = (x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32) for x in (a, b))
        scale = float(jnp.max(jnp.abs(b), initial=0.0)) or 1.0
        error = float(jnp.max(jnp.abs(a - b), initial=0.0)) / scale
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst
