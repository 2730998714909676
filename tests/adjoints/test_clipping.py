"""Clipping what flows back through time, against a loop written by hand."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import PROBLEMS, error, scan, tolerance

import pararnn as prnn

LENGTH = 13
SOLVERS = {
    "Sequential": prnn.Sequential(),
    "Newton 1": prnn.Newton(chunk_size=1),
    "Newton 4": prnn.Newton(chunk_size=4),
    "Jacobi": prnn.Jacobi(chunk_size=4),
}
over_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def loss(states):
    return sum(
        jnp.sum(jnp.sin(3 * jnp.real(h)) + jnp.imag(h) ** 2) for h in jtu.tree_leaves(states)
    )


def clip(x, limit):
    if np.iscomplexobj(x):
        return np.clip(x.real, -limit, limit) + 1j * np.clip(x.imag, -limit, limit)
    return np.clip(x, -limit, limit)


def by_hand(problem, params, xs, init, limit):
    """The gradient of `loss`, one step backwards after another."""
    states = scan(lambda h, x: problem.step(params, h, x), xs, init)
    flowing = jtu.tree_map(jnp.zeros_like, init)
    direct = jax.grad(loss)(states)
    total, inputs = jtu.tree_map(jnp.zeros_like, params), []
    pull = jax.jit(lambda p, h, x, ct: jax.vjp(problem.step, p, h, x)[1](ct))
    for t in reversed(range(LENGTH)):
        flowing = jtu.tree_map(lambda a, g, t=t: clip(np.asarray(a + g[t]), limit), flowing, direct)
        before = init if t == 0 else jtu.tree_map(lambda h, t=t: h[t - 1], states)
        x = jtu.tree_map(lambda x, t=t: x[t], xs)
        to_params, flowing, to_x = pull(params, before, x, flowing)
        total = jtu.tree_map(jnp.add, total, to_params)
        inputs.insert(0, to_x)
    return total, jtu.tree_map(lambda *x: jnp.stack(x), *inputs), flowing


def gradient(problem, arguments, solver, adjoint):
    def run(params, xs, init):
        step = lambda h, x: problem.step(params, h, x)  # noqa: E731
        return loss(prnn.solve(step, xs, init, solver=solver, adjoint=adjoint).states)

    return jax.jit(jax.grad(run, (0, 1, 2)))(*arguments)


@pytest.mark.parametrize("name", ["LSTM", "complex"])
def test_against_a_loop(name):
    problem = PROBLEMS[name]
    arguments = problem.make(LENGTH, np.float64)
    expected = by_hand(problem, *arguments, 0.5)
    adjoint = prnn.ClippedAdjoint(0.5)
    got = gradient(problem, arguments, prnn.Newton(chunk_size=4), adjoint)
    assert error(got, expected) <= tolerance(np.float64)
    assert error(gradient(problem, arguments, None, None), expected) > 0.01


@over_solvers
def test_solvers_of_the_clipped_recurrence(solver):
    problem = PROBLEMS["diagonal GRU"]
    arguments = problem.make(LENGTH, np.float64)
    got = gradient(problem, arguments, None, prnn.ClippedAdjoint(0.5, solver))
    assert error(got, by_hand(problem, *arguments, 0.5)) <= 1e-9


def test_no_limit_is_the_true_gradient():
    problem = PROBLEMS["Elman"]
    arguments = problem.make(LENGTH, np.float64)
    got = gradient(problem, arguments, None, prnn.ClippedAdjoint(np.inf))
    assert error(got, gradient(problem, arguments, None, None)) <= tolerance(np.float64)


def run_layer(cell, xs, limit=0.3, mask=None):
    rnn = prnn.RNN(cell, adjoint=prnn.ClippedAdjoint(limit))
    return jnp.sum(rnn(xs, mask=mask)[0] ** 2)


def test_layer_in_a_batch_with_padding():
    """Padding has no part in it."""
    cell = prnn.Elman(2, 3, key=jax.random.key(0))
    xs = jnp.stack([jnp.ones((6, 2)), jnp.full((6, 2), 2.0)])
    masks = np.arange(6) < np.asarray([[4], [6]])
    value = jax.vmap(jax.grad(run_layer, 1), in_axes=(None, 0, None, 0))
    got = jax.jit(lambda xs: value(cell, xs, 0.3, masks))(xs)
    short = jax.jit(jax.grad(run_layer, 1))(cell, xs[0, :4])
    assert error(got[0, :4], short) <= 1e-10 and np.all(got[0, 4:] == 0)


def test_modes():
    """No forward mode; but the clipped gradient is itself a function with derivatives."""
    cell = prnn.Elman(2, 3, key=jax.random.key(0))
    xs = jnp.ones((6, 2))
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(lambda xs: run_layer(cell, xs), (xs,), (xs,))

    def slope(scale):
        return jax.grad(lambda s: run_layer(cell, s * xs))(scale)

    at, small = jnp.asarray(1.0), 1e-5
    differences = (slope(at + small) - slope(at - small)) / (2 * small)
    assert abs(jax.grad(slope)(at) - differences) <= 1e-6 * abs(differences)
    assert abs(jax.jvp(slope, (at,), (at,))[1] - differences) <= 1e-6 * abs(differences)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), True, "1"])
def test_limit_is_checked(as_users_run_it, limit):
    with pytest.raises((TypeError, ValueError), match="`limit` must be"):
        prnn.ClippedAdjoint(limit)


def test_misplaced(as_users_run_it):
    with pytest.raises(TypeError, match="`solver` must be a solver instance; got 'x'"):
        prnn.ClippedAdjoint(1.0, "x")
    clipped = prnn.ClippedAdjoint(1.0)
    with pytest.raises(TypeError, match="`solver` must be a solver instance.*Pass it as `adjoint`"):
        prnn.RNN(prnn.Elman(2, 3, key=jax.random.key(0)), solver=clipped)
