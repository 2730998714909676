"""Chunks of steps of PLSTM, by products of matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import error

import pararnn as prnn

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast


def make(dtype=jnp.float64):
    cell = prnn.PLSTM(4, 2, 3, 5, 2, dtype=dtype, key=KEY)
    # Transitions over a wide range: down to 1e-6 and less.
    where = lambda c: (c.weight_gates, c.bias_gates)  # noqa: E731
    return eqx.tree_at(where, cell, (8 * cell.weight_gates, 0 * cell.bias_gates))


def inputs(length, dtype=jnp.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((length, 4)), dtype)


@eqx.filter_jit
def run(cell, xs, state=None, solver=None, **options):
    return prnn.RNN(cell, solver=solver)(xs, state, throw=False, **options)


@pytest.mark.parametrize("length", [1, 63, 64, 1000, 4097])
def test_chunks_are_the_steps(length):
    @eqx.filter_jit
    def by_scan(cell, xs):
        us = cell.project(xs)
        step = lambda h, u: (cell.step(h, u),) * 2  # noqa: E731
        final, states = jax.lax.scan(step, cell.init_state(), us)
        return cell.readout(states, us), (final, xs[-1:])

    for dtype, tol in ((jnp.float32, 1e-5), (jnp.float64, 1e-10)):
        cell, xs = make(dtype), inputs(length, dtype)
        assert error(run(cell, xs), by_scan(cell, xs)) <= tol


def test_chunks_of_pieces():
    """With starts anew, padding, and a state to continue from; derivatives in both modes."""
    cell, batch = make(), jnp.stack([inputs(150), inputs(150, seed=1)])
    _, state = run(cell, inputs(7, seed=2))
    options = {
        "reset": np.isin(np.arange(150), (9, 10, 64, 100)),
        "mask": ~np.isin(np.arange(150), (3, 10, 11, 63, 149)),
    }
    params, rest = eqx.partition(cell, eqx.is_inexact_array)
    weights = jnp.cos(jnp.arange(300.0).reshape(150, 2))
    arguments = (params, batch, state)

    def results(solver):
        def one(params, xs, state):
            cell = eqx.combine(params, rest)
            ys, final = run(cell, xs, state, solver=solver, **options)
            return jnp.vdot(weights, ys) + jnp.sum(jnp.sin(final[0])), (ys, final)

        def loss(*arguments):
            values, outputs = jax.vmap(one, (None, 0, None))(*arguments)
            return jnp.sum(values), outputs

        tangents = jax.tree_util.tree_map(jnp.ones_like, arguments)
        return (
            jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments),
            jax.jit(lambda: jax.jvp(jax.checkpoint(loss), arguments, tangents))(),
        )

    assert error(results(None), results(prnn.Sequential())) <= 1e-10


def test_streaming():
    cell, xs = make(), inputs(70)
    rnn = prnn.RNN(cell)
    step = lambda state, x: rnn.step(state, x)[::-1]  # noqa: E731
    final, ys = jax.lax.scan(step, rnn.init_state(xs[0]), xs)
    assert error((ys, final), run(cell, xs)) <= 1e-12


def test_a_step_reads_the_memory_before_it():
    """With marks shut, only what is direct is left; with these shut, the first output is zero."""
    bias = jnp.zeros((4, 2)).at[2].set(-1e4)
    where = lambda c: (c.weight_gates, c.bias_gates)  # noqa: E731
    shut = eqx.tree_at(where, make(), (jnp.zeros((4, 2, 4)), bias))
    whole, _ = run(shut, inputs(5))
    for t in range(5):
        assert error(run(shut, inputs(5)[t : t + 1])[0], whole[t : t + 1]) <= 1e-14
    shut = eqx.tree_at(where, make(), (jnp.zeros((4, 2, 4)), jnp.roll(bias, 1, 0)))
    ys, _ = run(shut, inputs(5))
    assert not ys[0].any() and ys[1].all()
