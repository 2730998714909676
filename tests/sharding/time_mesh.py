"""Recurrences whose time axis lies on several devices, and the comparison with one device."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import pararnn as prnn

SIZE, LENGTH = 3, 21
rng = np.random.default_rng(0)
WEIGHT = jnp.asarray(0.8 * rng.normal(size=(SIZE, SIZE)) / SIZE**0.5)
XS = jnp.asarray(rng.normal(size=(24, SIZE)))
INIT = jnp.asarray(rng.normal(size=SIZE))
RESET = jnp.asarray(rng.random(24) < 0.15)
MASK = jnp.asarray(rng.random(24) < 0.7)
SCALES = jnp.arange(1.0, SIZE + 1)


def mesh_of(count, kind="Auto"):
    kinds = (getattr(AxisType, kind),)
    return jax.make_mesh((count,), ("time",), axis_types=kinds, devices=jax.devices()[:count])


def elman(w, h, x):
    return jnp.tanh(w @ h + x)


class Elman(eqx.Module):
    weight: jax.Array

    def __call__(self, h, x):
        return elman(self.weight, h, x)


def diagonal(w, h, x):
    return jnp.tanh(jnp.diagonal(w) * h + x)


def latch(w, h, x):
    """Never forgets."""
    return jnp.tanh(3 * h + x + 0 * w[0])


def outcome(solver, adjoint=None, step=elman, **options):
    """A loss of all states and the last one, these, and the gradients of the loss."""

    def loss(w, xs, init):
        run = prnn.solve(
            functools.partial(step, w), xs, init, solver=solver, adjoint=adjoint, **options
        )
        total = jnp.sum(run.states**2 * jnp.expand_dims(SCALES, 0)) + jnp.sum(run.final)
        return total, (run.states, run.final, run.result == prnn.RESULTS.successful)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def close(got, expected, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, expected)


@functools.cache
def expected_of(length):
    return outcome(prnn.Sequential(), throw=False)(WEIGHT, XS[:length], INIT)


def agrees(solver, adjoint=None, *, count=8, kind="Auto", length=LENGTH, step=elman, **options):
    """Also in whether it was successful. What raises takes longer: one does, of each kind."""
    throw = options.pop("throw", False)
    if options or step is not elman:
        xs = options.pop("xs", XS[:length])
        expected = outcome(prnn.Sequential(), step=step, throw=False, **options)(WEIGHT, xs, INIT)
    else:
        xs, expected = XS[:length], expected_of(length)
    solver, options = prnn.TimeSharded("time", solver), {**options, "throw": throw}
    with jax.set_mesh(mesh_of(count, kind)):
        close(outcome(solver, adjoint, step, **options)(WEIGHT, xs, INIT), expected)
