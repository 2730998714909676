"""Tolerances, errors, and other numbers that say how large or how alike arrays are."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, PyTree

from ._line import Line
from ._misc import real_leaves


def all_finite(tree: PyTree[Array], *, keep_axes: int = 0) -> Bool[Array, "..."]:
    """Whether every element is finite, reduced over all but the first `keep_axes` axes."""

    # On a CPU, XLA takes four times as long for a flag of each element. A maximum passes NaN on.
    def largest(x):
        return jnp.max(jnp.abs(x), axis=tuple(range(keep_axes, x.ndim)), initial=0)

    flags = [largest(x) < jnp.inf for x in real_leaves(tree)]
    return jnp.all(jnp.stack(flags), axis=0)


def default_rtol(dtype: Any) -> float:
    """`eps ** 0.8`: about 24 ulps in float32, 1300 in float64, 3 in bfloat16.

    A tolerance near one ulp never settles, because the iteration's own rounding moves the states
    by a few; the exponent below one leaves the wide types room for the conditioning of the system.
    """
    return float(jnp.finfo(dtype).eps) ** 0.8


def alignment(
    a: PyTree[Inexact[Array, "..."]], b: PyTree[Inexact[Array, "..."]], line: Line | None = None
) -> Float[Array, ""]:
    """The largest cosine between corresponding leaves; 0 for a leaf that is zero in either. Leaves
    may lie on a `line` of several devices."""
    line = Line() if line is None else line

    def scaled(v):
        # To a largest magnitude of 1, so that the squares neither overflow nor vanish.
        return v / jnp.maximum(line.largest(jnp.max(jnp.abs(v))), 1e-30).astype(v.dtype)

    def products(x, y):
        x, y = scaled(x), scaled(y)
        found = jnp.abs(x) ** 2, jnp.abs(y) ** 2, jnp.real(jnp.conj(x) * y)
        return [jnp.sum(p).astype(jnp.float32) for p in found]

    def cosine(squares_x, squares_y, product):
        squares = squares_x * squares_y
        return jnp.where(squares > 0, product / jnp.sqrt(jnp.maximum(squares, 1e-30)), 0.0)

    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    found = [product for x, y in pairs if x.size for product in products(x, y)]
    if not found:
        return jnp.zeros((), jnp.float32)
    totals = iter(line.totals(found))
    cosines = [cosine(*three) for three in zip(totals, totals, totals, strict=True)]
    return jnp.max(jnp.stack(cosines), initial=-1.0)


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
