"""Random weights, made within a step from weights of other shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def one_of(rng: Any, items: Any) -> Any:
    items = list(items)
    return items[rng.integers(len(items))]


def factors(rng: Any, n: int) -> list[int]:
    """Two of which a number is the product."""
    d = one_of(rng, [d for d in range(1, n + 1) if n % d == 0])
    return [d, n // d]


def random_array(rng: Any, shape: Sequence[int], dtype: Any) -> Any:
    array = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        array = array + 1j * rng.standard_normal(shape)
    if dtype == np.bool_:
        array = array > 0
    elif jnp.issubdtype(dtype, jnp.integer):
        array = 9 * array
    return jnp.asarray(array, dtype)


def rearranged_weight(rng: Any, shape: Sequence[int], dtype: Any) -> Callable[[], Any]:
    """A weight that is made in the step from one of another shape."""
    shape = tuple(shape)
    ways = ["plain", "slice", "reverse", "concatenate", "broadcast", "index"]
    ways += ["repeat", "tile", "regroup", "regroup", "pad"]
    way = one_of(rng, ways) if shape else "plain"
    axis = int(rng.integers(len(shape))) if shape else 0
    n = shape[axis] if shape else 1
    divisors = [d for d in range(2, n + 1) if n % d == 0]

    def base(size):
        return random_array(rng, [*shape[:axis], size, *shape[axis + 1 :]], dtype)

    if way == "slice":
        step = one_of(rng, [1, 2, 3])
        w, start = base(n * step + 2), int(rng.integers(3))
        return lambda: lax.slice_in_dim(w, start, start + (n - 1) * step + 1, step, axis)
    if way == "reverse":
        w = base(n)
        return lambda: jnp.flip(w, axis)
    if way == "concatenate" and n > 1:
        w, cut = base(n - 1), int(rng.integers(1, n))
        return lambda: jnp.concatenate(
            [lax.slice_in_dim(w, n - 1 - cut, n - 1, axis=axis)]
            + ([lax.slice_in_dim(w, 0, n - cut, axis=axis)] if n > cut else []),
            axis,
        )
    if way == "broadcast":
        w = base(1)
        return lambda: jnp.broadcast_to(w, shape)
    if way == "index":
        w, index = base(n + 1), rng.integers(0, n + 1, n)
        return lambda: jnp.take(w, index, axis)
    if way == "repeat" and divisors:
        d = one_of(rng, divisors)
        w = base(n // d)
        return lambda: jnp.repeat(w, d, axis)
    if way == "tile" and divisors:
        d = one_of(rng, divisors)
        w, reps = base(n // d), [d if k == axis else 1 for k in range(len(shape))]
        return lambda: jnp.tile(w, reps)
    if way == "regroup":
        split = [f for size in shape for f in factors(rng, size)]
        order = [int(k) for k in rng.permutation(len(split))]
        w = random_array(rng, [split[k] for k in np.argsort(order)], dtype)
        # Some of the axes are shared.
        sizes = [1 if rng.random() < 0.15 else size for size in w.shape]
        w, whole = w[tuple(slice(size) for size in sizes)], w.shape
        return lambda: jnp.broadcast_to(w, whole).transpose(order).reshape(shape)
    if way == "pad" and n > 2:
        w = base(n - 2)
        config = [(1, 1, 0) if k == axis else (0, 0, 0) for k in range(len(shape))]
        return lambda: lax.pad(w, jnp.zeros((), dtype), config)
    w = random_array(rng, shape, dtype)
    return lambda: w
