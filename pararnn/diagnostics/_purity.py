"""Is a step a function? One that counts its calls or draws numbers of its own is traced into
another program each time, and there is nothing that two solvers could agree on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._misc import num_steps, previous_states

_PLACES = 8
# The sums of an accelerator may be rounded in another order each time.
_ULPS = 100


def is_pure(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
    xs: PyTree[Any],
    init: PyTree[Any],
    states: PyTree[Any],
) -> bool:
    """Whether `step`, traced and compiled twice, gives the same numbers at some of the states."""
    length = num_steps(xs)
    if length == 0:
        return True
    places = np.unique(np.linspace(0, length - 1, _PLACES).astype(int))
    at = jtu.tree_map(lambda x: x[places], (previous_states(init, states), xs))
    # A new function each time, which JAX has not traced yet.
    first, again = (jtu.tree_leaves(jax.jit(lambda h, x: jax.vmap(step)(h, x))(*at)) for _ in "ab")
    return all(map(_same, first, again))


def _same(a: Any, b: Any) -> bool:
    tolerance = _ULPS * float(jnp.finfo(a.dtype).eps)
    close = jnp.abs(a - b) <= tolerance * jnp.maximum(jnp.abs(a), jnp.abs(b))
    return bool(jnp.all(close | (a == b) | (jnp.isnan(a) & jnp.isnan(b))))
