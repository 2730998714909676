"""What a sweep is, by `lax.scan` over rows that NumPy looks up."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from systems import INTERPRET

from pararnn.kernels import fused_sweep


def plain_sweep(step, starts, xs, *, num_steps, stride, first=0, keep, reverse=False):
    length, chunks = len(jtu.tree_leaves(xs)[0]), len(jtu.tree_leaves(starts)[0])
    rows = [[first + c * stride + i for i in range(num_steps)] for c in range(chunks)]
    rows = np.clip(rows, 0, length - 1)
    rows = length - 1 - rows if reverse else rows

    def chunk(start, xs):
        def body(carry, x):
            carry = step(carry, x)
            return carry, carry

        return jax.lax.scan(body, start, xs)

    ends, states = jax.vmap(chunk)(starts, jtu.tree_map(lambda x: x[rows], xs))
    if not keep:
        return ends, None
    states = jtu.tree_map(lambda s: jax.lax.collapse(s, 0, 2)[:length], states)
    return ends, jtu.tree_map(lambda s: jnp.flip(s, 0), states) if reverse else states


def both(step, starts, xs, **geometry):
    """The results of the kernel, and of the plain sweep."""
    fused = jax.jit(lambda s, x: fused_sweep(step, s, x, interpret=INTERPRET, **geometry))(
        starts, xs
    )
    plain = jax.jit(lambda s, x: plain_sweep(step, s, x, **geometry))(starts, xs)
    return fused, plain


def agree(fused, plain, units=64):
    """Whether all leaves have the same types, and the same values but for the rounding of a few
    operations, in units of the last place of the largest."""
    assert jtu.tree_structure(fused) == jtu.tree_structure(plain)
    for a, b in zip(jtu.tree_leaves(fused), jtu.tree_leaves(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        a, b = np.asarray(a, wide), np.asarray(b, wide)
        assert np.isfinite(b).all()
        scale = max(1.0, np.abs(b).max(initial=0))
        eps = float(jnp.finfo(jtu.tree_leaves(plain)[0].dtype).eps)
        assert np.abs(a - b).max(initial=0) <= units * eps * scale


def starts_like(init, chunks, seed=7):
    """Carries around an initial state."""
    rng = np.random.default_rng(seed)

    def one(x):
        noise = rng.standard_normal((chunks, *x.shape))
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            noise = noise + 1j * rng.standard_normal(noise.shape)
        noise = jnp.asarray(0.3 * noise, x.dtype)
        return jnp.expand_dims(x, 0) + noise

    return jtu.tree_map(one, init)
