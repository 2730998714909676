"""Linear recurrences against a loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal

import pararnn as prnn

STRUCTURES = {
    "diagonal": (prnn.Diagonal(), 3, (3,)),
    "blocks": (prnn.BlockDiagonal.interleaved(2, 2), 4, (2, 2, 2)),
    "unequal blocks": (prnn.BlockDiagonal(((0, 2), (1,))), 3, (2, 2, 2)),
    "dense": (prnn.Dense(), 3, (3, 3)),
}
METHODS = [prnn.scans.Sequential(), prnn.scans.Associative(), prnn.scans.Radix()]
over_structures = pytest.mark.parametrize("name", STRUCTURES)
over_methods = pytest.mark.parametrize("method", METHODS)


def problem(name, length, dtype=np.float64):
    structure, size, shape = STRUCTURES[name]
    matrices = normal(0, (length, *shape), dtype, 0.6)
    if name == "unequal blocks":  # what pads the smaller group is zero
        matrices = matrices.at[:, 1, :, 1].set(0).at[:, 1, 1, :].set(0)
    return structure, matrices, normal(1, (length, size), dtype)


def loop(structure, matrices, offsets, reverse):
    full = [np.asarray(structure.to_dense(matrix)) for matrix in matrices]
    out, h = np.zeros(offsets.shape, offsets.dtype), np.zeros(offsets.shape[1], offsets.dtype)
    times = range(len(out))
    for t in reversed(times) if reverse else times:
        h = full[t] @ h + np.asarray(offsets[t])
        out[t] = h
    return out


@over_structures
@over_methods
@pytest.mark.parametrize("length", [0, 1, 2, 7, 50])
def test_values(name, method, length):
    structure, matrices, offsets = problem(name, length)

    @jax.jit
    def both(matrices, offsets):
        solve = functools.partial(prnn.linear_recurrence, structure, matrices, offsets)
        return solve(method=method), solve(method=method, reverse=True)

    for got, reverse in zip(both(matrices, offsets), (False, True), strict=True):
        assert got.shape == offsets.shape and got.dtype == offsets.dtype
        expected = loop(structure, matrices, offsets, reverse)
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


@over_methods
def test_float32(method):
    structure, matrices, offsets = problem("dense", 50, np.float32)
    got = prnn.linear_recurrence(structure, matrices, offsets, method=method)
    assert got.dtype == np.float32
    expected = loop(structure, matrices.astype(float), offsets.astype(float), False)
    assert np.max(np.abs(np.asarray(got) - expected)) <= 50 * 1.2e-7 * np.max(np.abs(expected))


@over_methods
def test_batches_and_derivatives(method):
    """`vmap` of the recurrence; its derivative, with respect to the matrices too."""
    structure, matrices, offsets = problem("blocks", 9)

    def run(matrices, offsets):
        return prnn.linear_recurrence(structure, matrices, offsets, method=method)

    def reference(matrices, offsets):
        def step(h, element):
            matrix, offset = element
            h = structure.to_dense(matrix) @ h + offset
            return h, h

        return jax.lax.scan(step, jnp.zeros(4), (matrices, offsets))[1]

    many = (jnp.stack([matrices, -matrices, 0 * matrices]), jnp.stack([offsets] * 3))
    np.testing.assert_allclose(
        jax.vmap(run)(*many), jax.vmap(reference)(*many), rtol=1e-11, atol=1e-12
    )
    grads = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1)))
        for f in (run, reference)
    ]
    for got, expected in zip(*(g(matrices, offsets) for g in grads), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)


def test_default_method_and_errors():
    structure, matrices, offsets = problem("diagonal", 7)
    got = prnn.linear_recurrence(structure, matrices, offsets)
    np.testing.assert_allclose(got, loop(structure, matrices, offsets, False), rtol=1e-12)
    with pytest.raises(TypeError, match=r"`method` must be .*Sequential\(\).*got 'parallel'"):
        # Past the type check of the tests, which refuses it first.
        prnn.linear_recurrence.__wrapped__(structure, matrices, offsets, method="parallel")
