"""Iterations that are not asked for their success, and chunks that start early: never wrong."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal, scan

import pararnn as prnn
from pararnn.jaxprs._walk import called, open_jaxpr

# Checking the types of calls takes a quarter of the time; other tests do.
pytestmark = pytest.mark.usefixtures("as_users_run_it")
D = 3
WEIGHT = normal(0, (D, D), np.float64, 0.4)
XS = normal(1, (70, D))
STEPS = {
    "dense": lambda h, x: jnp.tanh(WEIGHT @ h + x),
    "diagonal": lambda h, x: jnp.tanh(0.7 * h + x),
    "affine": lambda h, x: 0.8 * h + x,
}
SOLVERS = {
    "one ahead": prnn.Newton(chunk_size=8, min_iters=1),
    "ahead": prnn.Newton(chunk_size=8, min_iters=2),
    "far ahead": prnn.Newton(chunk_size=8, min_iters=5, sweep_method=prnn.sweeps.Unrolled()),
    "early": prnn.Newton(chunk_size=16, overlap=5),
    "a chunk early": prnn.Newton(chunk_size=16, overlap=16, linear_method=prnn.scans.Radix()),
    "both": prnn.Newton(chunk_size=8, overlap=8, min_iters=1),
    "Jacobi": prnn.Jacobi(chunk_size=16, overlap=16),
    "Jacobi ahead": prnn.Jacobi(chunk_size=16, min_iters=3),
    "Levenberg": prnn.LevenbergMarquardt(chunk_size=8, overlap=4, min_iters=2),
    "Picard": prnn.Picard(chunk_size=4, overlap=2),
    "Speculative": prnn.solvers.Speculative(chunk_size=8, num_candidates=3, overlap=4),
}


# Each solver with the dense step, and with another one.
_OTHERS = [("dense", 1), ("diagonal", 17), ("affine", 70)]
CASES = [
    (solver, *case)
    for i, solver in enumerate(SOLVERS)
    for case in (("dense", 70), _OTHERS[i % len(_OTHERS)])
]


@pytest.mark.parametrize("solver, name, length", CASES)
def test_values(solver, name, length):
    step = STEPS[name]
    solution = prnn.solve(step, XS[:length], jnp.ones(D), solver=SOLVERS[solver])
    expected = scan(step, XS[:length], jnp.ones(D))
    np.testing.assert_allclose(solution.states, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ahead", "a chunk early"])
def test_batches_and_gradients(name):
    """Under `jit`, `vmap` and `grad`; one sequence needs more than the others."""
    gains, xs = jnp.array([0.1, 0.5, 3.0]), jnp.stack([XS, 2 * XS, XS])

    def loss(gain, xs, solve):
        return jnp.sum(jnp.sin(solve(lambda h, x: jnp.tanh(gain * WEIGHT @ h + x), xs)))

    def ours(step, xs):
        return prnn.solve(step, xs, jnp.ones(D), solver=SOLVERS[name]).states

    def run(solve):
        return jax.vmap(jax.value_and_grad(functools.partial(loss, solve=solve)))

    got = jax.jit(run(ours))(gains, xs)
    expected = jax.jit(run(lambda step, xs: scan(step, xs, jnp.ones(D))))(gains, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), got, expected)


def test_what_is_forgotten_needs_no_iteration():
    solver = prnn.Newton(chunk_size=16, overlap=16)
    xs = XS.astype(np.float32)
    weight = jnp.asarray(0.3 * WEIGHT, np.float32)
    solution = prnn.solve(lambda h, x: jnp.tanh(weight @ h + x), xs, xs[0], solver=solver)
    assert solution.stats.iterations == 0
    # The overlap, and the sweep that makes the states.
    assert solution.stats.sequential_steps == 16 + 16
    more = prnn.solve(lambda h, x: 0.99 * h + 0.01 * x, xs, xs[0], solver=solver)
    assert more.stats.iterations > 0


HARD = {
    # Does not forget, and every defect is as small as rounding: they add up.
    "drift": lambda h, x: h + 1e-9 * (1 + x),
    # Close to a state that it leaves: the guess, 0, is at rest.
    "unstable": lambda h, x: jnp.clip(1.02 * h, -1, 1) + 0 * x,
    # Remembers the sign of a rare large input.
    "latch": lambda h, x: jnp.tanh(3 * h + 4 * jnp.where(jnp.abs(x) > 2.3, x, 0)),
    # Forgets in one element and counts in the other.
    "slow beside fast": lambda h, x: h * jnp.array([0.1, 1.0, 0.1], h.dtype) + 1e-8 * x,
    "chaotic": lambda h, x: jnp.sin(2.5 * (h + jnp.roll(h, 1)) + x),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(
    "solver",
    [
        prnn.Newton(chunk_size=16, overlap=16),
        prnn.Jacobi(chunk_size=16, overlap=4),
        prnn.Newton(chunk_size=16, min_iters=2),
        prnn.Jacobi(chunk_size=16, min_iters=2),
        prnn.Newton(chunk_size=16, min_iters=1),
    ],
    ids=["Newton early", "Jacobi early", "Newton ahead", "Jacobi ahead", "one ahead"],
)
def test_hard_systems(name, solver):
    """In float32, as exact as the scan's own rounding lets one tell."""
    xs = normal(4, (600, D)).astype(np.float32)
    init = jnp.full(D, 1e-7 if name == "unstable" else 1, np.float32)
    got = np.asarray(prnn.solve(HARD[name], xs, init, solver=solver).states, float)
    exact = np.asarray(scan(HARD[name], xs.astype(np.float64), init.astype(np.float64)))
    expected = np.asarray(scan(HARD[name], xs, init), float)
    scale = np.maximum(np.abs(exact), 1e-12)
    own = np.max(np.abs(expected - exact) / scale)
    error = np.max(np.abs(got - expected) / scale)
    assert error <= 2 * own + 3e-5, (error, own)


def test_without_the_sequential_finish():
    solver = prnn.Newton(chunk_size=16, overlap=16, fallback=False, max_iters=2)
    step = HARD["chaotic"]
    solution = prnn.solve(step, XS, jnp.ones(D), solver=solver, throw=False)
    assert solution.result == prnn.RESULTS.not_converged
    with pytest.raises(eqx.EquinoxRuntimeError, match="converge"):
        prnn.solve(step, XS, jnp.ones(D), solver=solver)


def top_level_loops(jaxpr):
    """The loops without a known number of turns that are not inside another one."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            found.append(eqn)
        elif (call := called(eqn)) is not None:
            found += top_level_loops(open_jaxpr(call.jaxpr)[0])
    return found


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("throw", [False, True])
def test_an_accelerator_asks_once(name, throw):
    """Whether a solve has succeeded; to raise if it has not asks nothing more. Each gradient's
    linear recurrence asks once whether its products have overflowed."""
    step, init = STEPS[name], jnp.ones(D)
    solver, _ = prnn.select_solver(step, XS, init, platform="cuda")
    adjoint, _ = prnn.select_adjoint(step, XS, init, platform="cuda")

    def states(xs):
        options = {"solver": solver, "adjoint": adjoint, "throw": throw}
        return prnn.solve(step, xs, init, **options).states

    assert len(top_level_loops(jax.make_jaxpr(states)(XS).jaxpr)) == 1
    gradient = jax.make_jaxpr(jax.grad(lambda xs: jnp.sum(states(xs))))(XS)
    assert len(top_level_loops(gradient.jaxpr)) == 2


def test_errors_from_the_rest():
    """Under `jit` and `vmap`: one sequence that fails raises, and none does if none fails."""
    solver = prnn.Newton(chunk_size=16, min_iters=2)

    @eqx.filter_jit
    def run(scale):
        def one(scale):
            step = lambda h, x: jnp.log(scale + 0 * x) + 0.1 * h  # noqa: E731
            return prnn.solve(step, XS, jnp.ones(D), solver=solver).states

        return jax.vmap(one)(scale)

    assert np.isfinite(run(jnp.array([1.0, 2.0]))).all()
    with pytest.raises(eqx.EquinoxRuntimeError, match="finite"):
        run(jnp.array([1.0, -2.0]))
