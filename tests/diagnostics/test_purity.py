"""`verify` tells a step that is no function, and a figure that is none."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal

import pararnn as prnn
from pararnn.diagnostics import _arguments
from pararnn.diagnostics._promises import is_pure

XS, INIT = normal(5, (30, 4)), jnp.zeros(4)


def counting():
    calls = itertools.count(1)
    return lambda h, x: 0.5 * jnp.tanh(h) + x * next(calls)


def drawing():
    random = np.random.default_rng(0)
    return lambda h, x: 0.5 * jnp.tanh(h) + x + h * random.normal(size=4)


@pytest.mark.parametrize("make", [counting, drawing])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_step_that_changes_when_it_is_traced_again(make, batch_size):
    found = prnn.verify(make(), XS, INIT, solver=prnn.Newton(), batch_size=batch_size)
    assert not found and not found.pure
    assert np.isnan(found.value_error) and np.isnan(found.gradient_error)
    first, values, gradients = str(found).splitlines()
    assert first.startswith("FAILED: the step gives other numbers when it is traced again.")
    assert "pure function" in first
    assert "values:    not measured" in values and "gradients: not measured" in gradients


def test_functions_are_pure():
    """NaN and infinity included, of complex states, integers, and no step at all."""
    noise = jax.random.normal(jax.random.key(0), (4,))

    def step(state, x):
        h, z, n = state["h"], state["z"], x["n"]
        return {"h": jnp.log(h + noise) * n, "z": z * x["z"] / 0}

    xs = {"n": jnp.arange(20.0), "z": jnp.ones((20, 1), complex)}
    init = {"h": noise, "z": jnp.ones(1, complex)}
    states = {"h": normal(0, (20, 4)), "z": jnp.ones((20, 1), complex)}
    assert is_pure(step, xs, init, states)
    empty = jax.tree.map(lambda x: x[:0], (xs, states))
    assert is_pure(counting(), empty[0], init, empty[1])


def test_what_rounding_explains_is_no_measurement(monkeypatch):
    """Another trajectory of a chaotic system, from a start that is off by some roundings."""
    xs, init = normal(0, (60, 6), np.float32, 0.3), normal(1, (6,), np.float32)

    def off(step, xs, init, **options):
        return prnn.solve(step, xs, init * (1 + 1e-6), solver=prnn.Sequential())

    monkeypatch.setattr(_arguments, "solve", off)
    found = prnn.verify(lambda h, x: jnp.sin(4 * h + x), xs, init)
    assert found and found.pure
    assert found.value_error <= found.tolerance < 0.1 < found.value_difference
    values, gradients = str(found).splitlines()[1:]
    assert f"off by {found.value_difference:.1e}, which rounding explains" in values
    assert found.gradient_error <= 10 * found.tolerance < found.gradient_difference
    assert "which rounding explains" in gradients
    measured = prnn.tune(
        lambda h, x: jnp.sin(4 * h + x), xs, init, solvers=[], repetitions=1, progress=False
    )
    assert measured.rows[0].agrees and measured.rows[0].rounding
    assert not measured.baseline.rounding
    row = next(line for line in str(measured).splitlines() if line.startswith("Sequential"))
    assert row.split()[-1] == "rounding"


def test_what_is_not_finite_is_told(monkeypatch):
    def broken(*args, **options):
        solution = prnn.solve(*args, solver=prnn.Sequential())
        return eqx.tree_at(lambda s: s.states, solution, solution.states * jnp.nan)

    monkeypatch.setattr(_arguments, "solve", broken)
    found = prnn.verify(lambda h, x: 0.5 * h + x, XS[:5], INIT)
    assert not found and "values:    not finite" in str(found)
