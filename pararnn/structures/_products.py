"""Products and inverses of many small matrices."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Up to this block size, products are written as sums of elementwise products: XLA fuses them into
# the surrounding kernel, where a batched matrix product would be one of its own. One term after
# another, as a reduction over so short an axis is not vectorised on a CPU.
_UNROLL_BLOCK_SIZE = 8
_HIGHEST = jax.lax.Precision.HIGHEST


def matmul(a: Float[Array, "... i k"], b: Float[Array, "... k j"]) -> Float[Array, "... i j"]:
    if a.shape[-1] <= _UNROLL_BLOCK_SIZE:
        columns = (jnp.expand_dims(a[..., j], -1) for j in range(a.shape[-1]))
        rows = (jnp.expand_dims(b[..., j, :], -2) for j in range(a.shape[-1]))
        return functools.reduce(jnp.add, map(jnp.multiply, columns, rows))
    return jnp.matmul(a, b, precision=_HIGHEST)


def matvec(a: Float[Array, "... i k"], v: Float[Array, "... k"]) -> Float[Array, "... i"]:
    return jnp.squeeze(matmul(a, jnp.expand_dims(v, -1)), -1)


def identity_like(like: Float[Array, "... k k"]) -> Float[Array, "... k k"]:
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def gauss_jordan(matrix: Float[Array, "... k k"]) -> Float[Array, "... k k"]:
    """The inverse of symmetric positive definite matrices, for which elimination needs no pivoting.

    Not `jnp.linalg`: several batched LAPACK solves in one program can deadlock on the CPU (seen in
    JAX 0.10.2), and on a GPU each matrix size is a library call of its own.
    """
    k = matrix.shape[-1]
    index = jnp.arange(k)

    def eliminate(p, m):
        pivot_row = jnp.take(m, p, axis=-2)
        pivot_column = jnp.take(m, p, axis=-1)
        pivot = jnp.expand_dims(jnp.take(pivot_row, p, axis=-1), -1)
        scaled_row = pivot_row / pivot
        outer = jnp.expand_dims(pivot_column, -1) * jnp.expand_dims(scaled_row, -2)
        is_row, is_column = jnp.expand_dims(index == p, -1), jnp.expand_dims(index == p, 0)
        lead = tuple(range(m.ndim - 2))
        is_row, is_column = jnp.expand_dims(is_row, lead), jnp.expand_dims(is_column, lead)
        eliminated = m - outer
        eliminated = jnp.where(is_row, jnp.expand_dims(scaled_row, -2), eliminated)
        column = -jnp.expand_dims(pivot_column / pivot, -1)
        corner = jnp.expand_dims(1 / pivot, -1)
        return jnp.where(is_column, jnp.where(is_row, corner, column), eliminated)

    return jax.lax.fori_loop(0, k, eliminate, matrix)
