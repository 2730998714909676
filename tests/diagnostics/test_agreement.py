"""What `verify` and `benchmark` judge by: each element by its own scale, in time too, unless
rounding explains a difference."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal, scan

import pararnn as prnn
from pararnn.diagnostics import _arguments
from pararnn.diagnostics._agreement import Agreement, _recent
from pararnn.diagnostics._rounding import rounded_anew

L = 1000
SIGNS = np.where(np.arange(L) % 3 == 0, -1.0, 1.0)


def clock(h, x):
    """A latch beside a counter that dwarfs it."""
    return jnp.stack([jnp.tanh(3 * h[0] * x), h[1] + 1])


def capped(h, x):
    return jnp.stack([jnp.tanh(3 * h[0] * x), jnp.minimum(h[1] + 1, 200)])


def outlier(h, x):
    """A latch that takes a large input as it is."""
    return jnp.where(x > 100, x, jnp.tanh(3 * jnp.clip(h, -1, 1) * x))


SYSTEMS = {
    "a large neighbour": (clock, SIGNS, [1.0, 1e6], np.float32),
    "an outlier": (outlier, np.where(np.arange(L) == 3, 1e7, SIGNS), 1.0, np.float32),
    "bfloat16": (capped, SIGNS, [1.0, 0.0], jnp.bfloat16),
}


def flipped(states):
    """The latch wrong in half of the steps, as a solver once returned it."""
    late = (jnp.arange(L) >= L // 2) & (jnp.arange(L) % 2 == 0)
    late = late.reshape(L, *[1] * (states.ndim - 1))
    wrong = jnp.where(late, -states, states)
    return wrong if states.ndim == 1 else states.at[:, :1].set(wrong[:, :1])


@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_excuses_another_element(name):
    step, xs, init, dtype = SYSTEMS[name]
    xs, init = jnp.asarray(xs, dtype), jnp.asarray(init, dtype)
    states = scan(step, xs, init)
    agreement = Agreement(step, xs, init, states)
    assert agreement.value_error(states).error == 0
    wrong = agreement.value_error(flipped(states))
    assert wrong.error > 1 and wrong.where.startswith("states[")


def changed_solve(change):
    """`solve` with other states: what a wrong solver would return as a success."""

    def solve(*args, **kwargs):
        solution = prnn.solve(*args, **{**kwargs, "solver": prnn.Sequential()})
        return eqx.tree_at(lambda s: s.states, solution, change(solution.states))

    return solve


@pytest.mark.parametrize("name", SYSTEMS)
def test_verify_catches_wrong_states(name, monkeypatch):
    step, xs, init, dtype = SYSTEMS[name]
    xs, init = jnp.asarray(xs, dtype), jnp.asarray(init, dtype)
    monkeypatch.setattr(_arguments, "solve", changed_solve(flipped))
    verification = prnn.verify(step, xs, init)
    assert not verification and verification.value_error > 1 and not verification.result
    assert verification.where in str(verification)


def tanh_step(h, x):
    return jnp.tanh(0.8 * h + x)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: 0.8 * s + jax.lax.stop_gradient(0.2 * s),
        lambda s: s.at[10].set(jax.lax.stop_gradient(s[10])),
        lambda s: s.at[:, 1].set(s[:, 1] * (1 + 1e-4)),
    ],
    ids=["gradient", "gradient of one step", "drift"],
)
def test_verify_catches_wrong_gradients_and_values(change, monkeypatch):
    """Elements of 1e6 and of 1 side by side: a wrong gradient of the small one counts."""
    scale = jnp.asarray([1e6, 1.0], np.float32)
    xs = normal(0, (64, 2), np.float32) * scale[None]

    def step(h, x):
        return scale * tanh_step(h / scale, x / scale)

    assert prnn.verify(step, xs, jnp.zeros_like(scale), solver=prnn.Sequential())
    monkeypatch.setattr(_arguments, "solve", changed_solve(change))
    assert not prnn.verify(step, xs, jnp.zeros_like(scale))


def test_a_slow_drift_is_not_rounding():
    """A neutral system of which rounding explains little, in many steps."""
    xs, init = jnp.full(4096, 1e-3, np.float32), jnp.zeros((), np.float32)

    def step(h, x):
        return h + x

    states = scan(step, xs, init)
    agreement = Agreement(step, xs, init, states)
    drift = jnp.arange(4096, dtype=np.float32) / 4096
    assert agreement.value_error(states * (1 + 1e-3 * drift)).error == pytest.approx(1e-3, rel=1e-2)
    assert agreement.value_error(states * (1 + 5e-6 * drift)).error <= agreement.tolerance


@pytest.mark.parametrize("adjoint", [prnn.Sequential(), prnn.Newton(chunk_size=1)])
def test_a_step_that_couples_the_batch_is_right_or_admitted(adjoint):
    """Its Jacobian couples sequences; `verify` says what is true of the gradient."""

    def step(h, x):
        return jnp.tanh(0.9 * h - 1.2 * jax.lax.pmean(h, "batch") + x)

    def loss(states_of):
        def of_inputs(xs):
            states = jax.vmap(states_of, in_axes=1, out_axes=1, axis_name="batch")(xs)
            return jnp.sum(jnp.sin(states))

        return jax.grad(of_inputs)(jnp.stack([jnp.roll(xs, i * 10, 0) for i in range(3)], axis=1))

    xs, init = normal(0, (30, 2)), jnp.zeros(2)
    options = {"solver": prnn.Sequential(), "adjoint": adjoint}
    try:
        gradient = loss(lambda xs: prnn.solve(step, xs, init, **options).states)
    except (TypeError, ValueError, NotImplementedError):
        return
    right = np.allclose(gradient, loss(lambda xs: scan(step, xs, init)), rtol=1e-8)
    found = prnn.verify(step, xs, init, **options, batch_size=3, axis_name="batch")
    assert found.ok == right and found.value_error == 0


def test_a_trajectory_of_a_chaotic_system_is_right_if_it_is_one():
    """Rounding alone gives another trajectory; that each state follows from the last remains."""
    xs, init = normal(0, (300, 6), np.float32, 0.3), normal(1, (6,), np.float32)

    def step(h, x):
        return jnp.sin(4 * h + x)

    expected = scan(step, xs, init)
    other = scan(step, xs, init * (1 + 1e-6))
    assert np.max(np.abs(other - expected)) > 0.5
    agreement = Agreement(step, xs, init, expected)
    assert agreement.value_error(other).error <= agreement.tolerance
    assert agreement.value_error(other.at[200:].set(0.1)).error > 0.1
    assert agreement.value_error(other.at[250, 2].add(1e-3)).error > agreement.tolerance


def test_what_is_left_of_a_cancellation_is_rounding():
    """An element that is nothing but rounding need not be the same rounding."""
    xs, init = normal(0, (100,), np.float32), jnp.zeros(2, np.float32)

    def step(h, x):
        a = jnp.tanh(0.5 * h[0] + x)
        return jnp.stack([a, (1.1 * a - a) - 0.1 * a])

    states = scan(step, xs, init)
    agreement = Agreement(step, xs, init, states)
    other = scan(lambda h, x: rounded_anew(step, jnp.uint32(7))(h, x), xs, init)
    assert not np.allclose(other[:, 1], states[:, 1], rtol=1e-2, atol=0)
    assert agreement.value_error(other).error <= agreement.tolerance
    assert agreement.value_error(states.at[:, 1].add(1e-4)).error > agreement.tolerance


def test_leaves_of_mixed_precision_are_judged_by_their_own():
    def step(state, x):
        a, b = state
        a = jnp.tanh(0.5 * a + x)
        return a, jnp.tanh(0.5 * b + a.astype(jnp.bfloat16))

    xs = normal(0, (100,), np.float32)
    init = (jnp.zeros((), np.float32), jnp.zeros((), jnp.bfloat16))
    wide, narrow = scan(step, xs, init)
    agreement = Agreement(step, xs, init, (wide, narrow))
    assert agreement.tolerance == 1e-5
    close = narrow * jnp.asarray(1.01, jnp.bfloat16)
    assert agreement.value_error((wide, close)).error <= agreement.tolerance
    assert agreement.value_error((wide * 1.001, narrow)).error > agreement.tolerance
    assert agreement.value_error((wide, -narrow)).error > agreement.tolerance


def test_what_is_not_finite_is_wrong():
    xs, init = normal(0, (20,)), jnp.zeros(())
    states = scan(tanh_step, xs, init)
    agreement = Agreement(tanh_step, xs, init, states)
    assert agreement.value_error(states.at[3].set(np.nan)).error == np.inf


def test_roundings_are_off_by_ulps_and_integers_stay():
    def step(h, x):
        return {"count": h["count"] + 1, "gate": jax.nn.sigmoid(h["gate"] + x) * x}

    state, x = {"count": jnp.float32(7), "gate": normal(0, (1000,), np.float32)}, jnp.float32(0.3)
    exact = step(state, x)
    other = rounded_anew(step, jnp.uint32(1))(state, x)
    assert other["count"] == 8
    off = np.abs(other["gate"] / exact["gate"] - 1) / np.finfo(np.float32).eps
    assert 1 < off.max() < 8
    again = rounded_anew(step, jnp.uint32(2))(state, x)
    assert np.any(again["gate"] != other["gate"])
    large = rounded_anew(jax.nn.sigmoid, jnp.uint32(3))(jnp.full(100, 20.0, np.float32))
    assert np.all(large <= 1) and np.any(large < 1)


def test_benchmark_disqualifies_what_a_large_neighbour_hid(monkeypatch):
    """A solver that reports success is not believed."""
    step, xs, init, dtype = SYSTEMS["a large neighbour"]

    def solve(*args, solver, **kwargs):
        wrong = isinstance(solver, prnn.Jacobi)
        return (changed_solve(flipped) if wrong else prnn.solve)(*args, solver=solver, **kwargs)

    monkeypatch.setattr(_arguments, "solve", solve)
    result = prnn.tune(
        step,
        jnp.asarray(xs, dtype),
        jnp.asarray(init, dtype),
        solvers=[prnn.Jacobi()],
        repetitions=1,
        progress=False,
    )
    assert [row.agrees for row in result.rows] == [True, False]
    assert result.rows[1].error > 1 and result.solver == prnn.Sequential()


def test_benchmark_disqualifies_wrong_gradients(monkeypatch):
    def solve(*args, solver, **kwargs):
        wrong = isinstance(solver, prnn.Jacobi)
        change = changed_solve(lambda s: 0.8 * s + jax.lax.stop_gradient(0.2 * s))
        return (change if wrong else prnn.solve)(*args, solver=solver, **kwargs)

    monkeypatch.setattr(_arguments, "solve", solve)
    result = prnn.tune(
        tanh_step,
        normal(0, (50,)),
        jnp.zeros(()),
        solvers=[prnn.Jacobi()],
        gradient=True,
        repetitions=1,
        progress=False,
    )
    assert [row.agrees for row in result.rows] == [True, False]


@pytest.mark.parametrize("length", [1, 5, 8, 40, 129, 400])
def test_scales_are_those_of_the_last_sixteenth(length):
    size = np.abs(np.asarray(normal(length, (length, 2))))
    window = max(8, length // 16)
    expected = [size[max(0, t - window + 1) : t + 1].max(axis=0) for t in range(length)]
    np.testing.assert_array_equal(_recent(size), expected)
