"""Tolerances, errors, and other numbers that say how large or how alike arrays are."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

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
