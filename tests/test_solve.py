"""`solve` against the plain scan: each pair of problem, solver and dtype, and every option."""

import dataclasses
import functools
import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
import systems
from systems import (
    PROBLEMS,
    SOLVERS,
    assert_right,
    error,
    normal,
    scan,
    successful,
    tolerance,
)

import pararnn as prnn

over = functools.partial(systems.over, SOLVERS)


def assert_stats_add_up(stats, solver, length):
    __tracebackhide__ = True
    iterations, steps = int(stats.iterations), int(stats.sequential_steps)
    if isinstance(solver, prnn.Sequential) or length == 0:
        assert (iterations, steps) == (0, length)
        assert (stats.chunk_size, bool(stats.fallback)) == (length, False)
        assert float(stats.correction) == 0
        return
    size = int(stats.chunk_size)
    chunks = -(-length // size)
    assert 1 <= size <= length
    if solver.chunk_size is not None:
        assert size == min(solver.chunk_size, length)
    # Each iteration makes one more chunk exact, unless damping rejects it.
    rejects = isinstance(solver, prnn.LevenbergMarquardt)
    assert iterations <= (solver.max_iters if rejects else min(solver.max_iters, chunks - 1))
    speculation = 4 * size if isinstance(solver, prnn.Speculative) and chunks > 2 else 0
    # The returned states are computed, and judged, once or again after further iterations.
    judged = steps - speculation - iterations * size
    assert judged >= size
    if bool(stats.fallback):
        # The finish starts after the first chunk that is known to be right.
        assert size < judged <= (iterations + 1) * size + max(length - size, 0)
    else:
        assert judged % size == 0
        assert judged <= (iterations + 1) * size
    assert np.isfinite(float(stats.correction)) or bool(stats.fallback)


@functools.cache
def reference(name, length, dtype):
    """A problem with parameters, and the scan's solution."""
    params, xs, init = PROBLEMS[name].make(length, dtype)
    step = functools.partial(PROBLEMS[name].step, params)
    return step, xs, init, scan(step, xs, init)


def check(name, solver, length, dtype, throw=False):
    """Programs that raise are not kept from one run of the tests to the next; the result tells."""
    step, xs, init, expected = reference(name, length, dtype)
    solution = prnn.solve(step, xs, init, solver=solver, throw=throw)
    assert_right(solution, expected)
    if length == 0:
        assert error(solution.final, init) == 0
    assert_stats_add_up(solution.stats, solver, length)
    return solution


@over()
def test_solvers(solver):
    check("LSTM", solver, 17, np.float32, throw=True)


_VARIED = (
    "Newton 1",
    "Newton 5",
    "QuasiNewton 4",
    "ElementwiseNewton 4",
    "Jacobi 4",
    "LevenbergMarquardt",
)


@pytest.mark.parametrize(
    "name, solver, dtype",
    [
        (name, solver, (np.float32, np.float64)[(i + j) % 2])
        for i, name in enumerate(PROBLEMS)
        for j, solver in enumerate(_VARIED)
    ],
)
def test_problems(name, solver, dtype):
    check(name, SOLVERS[solver], 17, dtype)


@over("Sequential", "Newton 1", "Newton 5", "QuasiNewton 4", "Picard", "Jacobi 16", "Speculative")
def test_short(solver):
    for length in (0, 1, 2):
        check("LSTM", solver, length, np.float32)


@over("Newton", "Newton 5", "Newton 1 associative", "QuasiNewton 1", "Picard", "Speculative")
def test_longer(solver):
    solution = check("Elman", solver, 64, np.float32)
    if isinstance(solver, (prnn.Newton, prnn.QuasiNewton)):
        assert not bool(solution.stats.fallback)
        assert int(solution.stats.iterations) <= 16


@pytest.mark.parametrize("name", ["LSTM", "complex"])
def test_affine_in_one_iteration(name):
    """Newton's method solves an affine recurrence at once; a second look may confirm it."""
    problem = PROBLEMS[name]
    params, xs, init = problem.make(30, np.float64)
    at = jtu.tree_map(lambda h: 0.3 * jnp.ones_like(h), init)

    def step(h, x):
        value, change = jax.jvp(
            lambda h: problem.step(params, h, x), (at,), (jtu.tree_map(jnp.subtract, h, at),)
        )
        return jtu.tree_map(jnp.add, value, change)

    expected = scan(step, xs, init)
    for solver in (prnn.Newton(chunk_size=1), prnn.Newton(chunk_size=7), prnn.AssociativeScan()):
        solution = prnn.solve(step, xs, init, solver=solver)
        assert_right(solution, expected)
        assert 1 <= int(solution.stats.iterations) <= 2
        assert not bool(solution.stats.fallback)


def test_associative_scan_refuses_what_is_not_affine():
    with pytest.raises(ValueError, match="affine in the state"):
        check("diagonal GRU", prnn.AssociativeScan(), 9, np.float32)


def test_default_solver():
    step, xs, init, expected = reference("diagonal GRU", 40, np.float32)
    assert_right(prnn.solve(step, xs, init), expected)
    solver, reason = prnn.select_solver(step, xs, init, platform="cpu")
    assert isinstance(solver, prnn.Sequential) and "CPU" in reason
    solver, reason = prnn.select_solver(step, xs, init, platform="gpu")
    assert isinstance(solver, prnn.Sequential) and "short" in reason
    xs = jtu.tree_map(lambda x: jnp.tile(x, (100, 1)), xs)
    solver, reason = prnn.select_solver(step, xs, init, platform="gpu")
    assert isinstance(solver, prnn.Newton) and "Diagonal" in reason


# --- dtypes -----------------------------------------------------------------------------------


@over("Sequential", "Newton 1", "Newton 5", "QuasiNewton 4", "Picard", "Jacobi 4")
def test_bfloat16(solver):
    """Half-precision inputs with float32 states, then half-precision states."""
    weights = normal(0, (3,), np.float32, 0.5)
    xs = normal(1, (20, 3)).astype(jnp.bfloat16)

    def wide(h, x):
        return jnp.tanh(weights * h + x.astype(jnp.float32))

    init = jnp.zeros(3, jnp.float32)
    assert_right(prnn.solve(wide, xs, init, solver=solver), scan(wide, xs, init))

    def narrow(h, x):
        return jnp.tanh(weights.astype(jnp.bfloat16) * h + x)

    init = jnp.zeros(3, jnp.bfloat16)
    solution = prnn.solve(narrow, xs, init, solver=solver)
    assert solution.states.dtype == jnp.bfloat16
    assert_right(solution, scan(narrow, xs, init))


@over("Newton 1", "Newton 5", "Jacobi 4")
def test_leaves_of_different_dtypes(solver):
    xs = normal(0, (20, 2), np.float32)

    def step(state, x):
        fast, slow = state
        fast = jnp.tanh(fast * jnp.bfloat16(0.5) + x.astype(jnp.bfloat16))
        return fast, 0.5 * slow + fast.astype(jnp.float32)

    init = (jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float32))
    expected = scan(step, xs, init)
    solution = prnn.solve(step, xs, init, solver=solver)
    assert successful(solution)
    # The narrow leaf has the rounding of its own dtype, and the wide one is made of it.
    for got, want in zip(solution.states, expected, strict=True):
        assert error(got, want) <= tolerance(jnp.bfloat16)


def test_default_precision():
    """As most users run it: float64 off, standard promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        xs, weights = normal(0, (33, 3), np.float32), normal(1, (3, 3), np.float32, 0.4)

        def step(h, x):
            return jnp.tanh(weights @ h + x)

        @functools.partial(jax.jit, static_argnums=1)
        def solved(weights, solver):
            def loss(weights):
                solution = prnn.solve(
                    lambda h, x: jnp.tanh(weights @ h + x),
                    xs,
                    jnp.zeros(3),
                    solver=solver,
                    adjoint=solver,
                )
                return jnp.sum(jnp.sin(solution.states)), solution

            gradient, solution = jax.grad(loss, has_aux=True)(weights)
            return solution, gradient

        expected = scan(step, xs, jnp.zeros(3))
        _, expected_gradient = solved(weights, prnn.Sequential())
        for solver in (prnn.Newton(), prnn.QuasiNewton(chunk_size=1), prnn.Jacobi(chunk_size=8)):
            solution, gradient = solved(weights, solver)
            assert solution.states.dtype == jnp.float32
            assert_right(solution, expected)
            assert error(gradient, expected_gradient) <= 1e-5


# --- what states and inputs may be ------------------------------------------------------------


@over("Newton 1", "Jacobi 4")
def test_token_ids_and_pytrees_of_inputs(solver):
    table = normal(0, (11, 4), np.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, 25), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 25)
    xs = {"token": tokens, "noise": (keys, normal(2, (25, 4), np.float32)), "none": None}

    def step(h, x):
        key, offset = x["noise"]
        mask = jax.random.bernoulli(key, 0.8, h.shape)
        return jnp.where(mask, jnp.tanh(0.5 * h + table[x["token"]] + offset), h)

    init = jnp.zeros(4, jnp.float32)
    assert_right(prnn.solve(step, xs, init, solver=solver), scan(step, xs, init))


class _State(eqx.Module):
    c: jax.Array
    h: jax.Array


@over("Sequential", "Newton 1", "Newton 5", "Jacobi 4")
def test_states_of_any_shape(solver):
    """Modules, None, scalars and empty arrays may be part of a state; Python numbers are arrays."""
    xs = normal(0, (13, 2))
    init = {
        "module": _State(jnp.zeros(2), jnp.ones((2, 1))),
        "nothing": None,
        "scalar": 0.5,
        "empty": jnp.zeros((0, 3)),
    }

    def step(state, x):
        c = jnp.tanh(0.5 * state["module"].c + x + state["scalar"])
        module = _State(c, jnp.tanh(0.3 * state["module"].h + c[:, None]))
        scalar = 0.2 * state["scalar"] + jnp.sum(x)
        return {"module": module, "nothing": None, "scalar": scalar, "empty": state["empty"]}

    expected = scan(step, xs, jtu.tree_map(jnp.asarray, init))
    solution = prnn.solve(
        step, xs, init, solver=solver, guess=expected, reset=jnp.zeros(13, bool), reset_state=init
    )
    assert error(solution.states, expected) <= tolerance(np.float64)


@over("Sequential", "Newton 1", "Newton 5", "Jacobi 4")
def test_nothing_to_solve(solver):
    """A state without elements."""
    solution = prnn.solve(lambda h, x: h, jnp.ones(7), jnp.zeros((0,)), solver=solver)
    assert successful(solution) and solution.states.shape == (7, 0)


# --- transformations --------------------------------------------------------------------------


@over("Newton 1", "Newton 5", "Newton 1 associative", "QuasiNewton 4", "Picard", "Jacobi 4")
def test_vmap(solver):
    """A batch in which each sequence needs its own number of iterations."""
    xs = normal(0, (4, 40, 3), np.float32)
    weights = jnp.asarray([0.05, 0.5, 0.95, 3.0], jnp.float32)

    init = jnp.zeros(3, jnp.float32)

    def run(weight, xs):
        step = lambda h, x: jnp.tanh(weight * h + x)  # noqa: E731
        return prnn.solve(step, xs, init, solver=solver, throw=False)

    def run_scan(weight, xs):
        return scan(lambda h, x: jnp.tanh(weight * h + x), xs, init)

    together = jax.jit(jax.vmap(run))(weights, xs)
    assert len({int(i) for i in together.stats.iterations}) > 1
    run_one, scan_one = jax.jit(run), jax.jit(run_scan)
    for i in range(4):
        solution = jtu.tree_map(lambda leaf, i=i: leaf[i], together)
        expected = scan_one(weights[i], xs[i])
        assert_right(solution, expected)
        assert_stats_add_up(solution.stats, solver, 40)
        alone = run_one(weights[i], xs[i])
        assert_right(alone, expected)
        for name in ("iterations", "sequential_steps", "fallback"):
            assert getattr(solution.stats, name) == getattr(alone.stats, name), name


def test_vmap_of_parts():
    """Batches of the initial states alone, or of the inputs alone; a batch of a batch."""
    step, xs, init, _ = reference("dense GRU", 20, np.float64)
    inits = jnp.stack([init, 0 * init, -init])
    many_xs = jtu.tree_map(lambda x: jnp.stack([x, -x]), xs)

    def run(xs, init):
        return prnn.solve(step, xs, init, solver=prnn.Newton(chunk_size=4)).states

    over_init = jax.vmap(run, in_axes=(None, 0))
    got = jax.jit(jax.vmap(over_init, in_axes=(0, None)))(many_xs, inits)
    for i in range(2):
        for j in range(3):
            one = jtu.tree_map(lambda x, i=i: x[i], many_xs)
            assert error(got[i, j], scan(step, one, inits[j])) <= tolerance(np.float64)


def test_closed_over_arrays():
    """Concrete ones, ones that are traced outside, and modules as steps; a new step is not confused
    with an old one."""
    xs, init = normal(0, (20, 3)), jnp.zeros(3)
    solver = prnn.Newton(chunk_size=4)

    @jax.jit
    def run(weights):
        shift = 2 * weights

        def step(h, x):
            return jnp.tanh(weights * h + shift + x)

        return prnn.solve(step, xs, init, solver=solver).states, scan(step, xs, init)

    for weights in (normal(1, (3,)), normal(2, (3,))):
        got, expected = run(weights)
        assert error(got, expected) <= tolerance(np.float64)

    class Step(eqx.Module):
        weights: jax.Array

        def __call__(self, h, x):
            return jnp.tanh(self.weights * h + x)

        def other(self, h, x):
            return jnp.tanh(self.weights * h - x)

    for weights in (normal(1, (3,)), normal(2, (3,))):
        module = Step(weights)
        for step in (module, module.other):
            got = prnn.solve(step, xs, init, solver=solver).states
            assert error(got, scan(step, xs, init)) <= tolerance(np.float64)


# --- guess ------------------------------------------------------------------------------------


@over("Newton 1", "Newton 5", "QuasiNewton 4", "Jacobi 4", "LevenbergMarquardt", "Speculative")
def test_guess(solver):
    step, xs, init, expected = reference("Elman", 60, np.float64)

    @jax.jit
    def run(guess):
        return prnn.solve(step, xs, init, solver=solver, guess=guess, throw=False)

    exact, near, far = run(expected), run(expected + 1e-6), run(normal(5, expected.shape))
    for solution in (exact, near, far):
        assert_right(solution, expected)
    assert int(exact.stats.iterations) <= 2
    assert int(exact.stats.iterations) <= int(near.stats.iterations)
    assert int(near.stats.iterations) < int(far.stats.iterations)
    assert not bool(exact.stats.fallback)


# --- reset ------------------------------------------------------------------------------------


@over("Sequential", "Newton 1", "Newton 5", "QuasiNewton 4", "Jacobi 4", "Speculative")
def test_reset(solver):
    """The same as running the pieces one by one, in values and in gradients."""
    problem, dtype, length = PROBLEMS["LSTM"], np.float64, 24
    params, xs, init = problem.make(length, dtype)
    again = jtu.tree_map(lambda h: h + 0.5, init)
    pieces = [(0, 7), (7, 8), (8, 24)]
    reset = jnp.zeros(length, bool).at[jnp.asarray([7, 8])].set(True)

    def in_pieces(params, xs, init, again):
        step = functools.partial(problem.step, params)
        states = [
            scan(step, jtu.tree_map(lambda x, a=a, b=b: x[a:b], xs), init if a == 0 else again)
            for a, b in pieces
        ]
        return jtu.tree_map(lambda *s: jnp.concatenate(s), *states)

    def at_once(params, xs, init, again):
        step = functools.partial(problem.step, params)
        return prnn.solve(
            step,
            xs,
            init,
            solver=solver,
            adjoint=solver,
            reset=reset,
            reset_state=again,
            throw=isinstance(solver, prnn.Newton),
        ).states

    def loss(run, *args):
        states = run(*args)
        return sum(jnp.sum(jnp.sin(3 * s)) for s in jtu.tree_leaves(states)), states

    (_, states), gradient, (_, expected), expected_gradient = (
        part
        for run in (at_once, in_pieces)
        for part in jax.jit(
            jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1, 2, 3), has_aux=True)
        )(params, xs, init, again)
    )
    assert error(states, expected) <= tolerance(dtype)
    assert error(gradient, expected_gradient) <= 1e-8


def test_reset_defaults_to_init():
    step, xs, init, _ = reference("dense GRU", 20, np.float64)
    reset = jnp.zeros(20, bool).at[jnp.asarray([0, 11])].set(True)
    for solver in (prnn.Newton(chunk_size=3), prnn.Jacobi(chunk_size=3)):
        got = prnn.solve(step, xs, init, solver=solver, reset=reset).states
        assert error(got[:11], scan(step, xs, init)[:11]) <= tolerance(np.float64)
        rest = jtu.tree_map(lambda x: x[11:], xs)
        assert error(got[11:], scan(step, rest, init)) <= tolerance(np.float64)


def test_reset_forgets_what_is_not_finite():
    """The state before a reset has no influence, even if it is NaN; nor has it in the gradient."""
    xs = jnp.ones((20, 1)).at[5].set(-1.0)
    reset = jnp.zeros(20, bool).at[9].set(True)

    def run(xs, solver):
        return prnn.solve(
            lambda h, x: 0.5 * h + jnp.log(x),
            xs,
            jnp.ones(1),
            solver=solver,
            adjoint=solver,
            reset=reset,
            throw=False,
        )

    for solver in (prnn.Sequential(), prnn.Newton(), prnn.Jacobi(chunk_size=4)):
        solution = run(xs, solver)
        assert solution.result == prnn.RESULTS.nonfinite
        np.testing.assert_array_equal(
            np.isnan(solution.states[:, 0]), (np.arange(20) >= 5) & (np.arange(20) < 9)
        )
        gradient = jax.jit(jax.grad(lambda xs, s=solver: jnp.sum(run(xs, s).states[12:])))(xs)
        assert np.all(np.isfinite(gradient[9:]))


# --- the report -------------------------------------------------------------------------------


def test_stats_of_exact_lengths():
    """One chunk is the sequential run; a chunk size beyond the length is cut to it."""
    step, xs, init, _ = reference("dense GRU", 10, np.float64)
    for size in (10, 1000):
        stats = prnn.solve(step, xs, init, solver=prnn.Newton(chunk_size=size)).stats
        assert (int(stats.iterations), int(stats.sequential_steps)) == (0, 10)
        assert (stats.chunk_size, bool(stats.fallback)) == (10, False)
    # Two chunks: after one iteration both are exact, whatever the method.
    for solver in (prnn.Jacobi(chunk_size=5), prnn.Picard(chunk_size=6)):
        stats = prnn.solve(step, xs, init, solver=solver).stats
        assert int(stats.iterations) == 1 and not bool(stats.fallback)
        assert int(stats.sequential_steps) == 2 * solver.chunk_size


def test_tolerances_are_obeyed():
    """A loose tolerance takes fewer iterations, and keeps its promise."""
    step, xs, init, expected = reference("Elman", 200, np.float64)
    iterations = []
    for rtol in (1e-12, 1e-8, 1e-4):
        for solver in (prnn.Jacobi(chunk_size=2, rtol=rtol), prnn.QuasiNewton(rtol=rtol)):
            solution = prnn.solve(step, xs, init, solver=solver)
            assert error(solution.states, expected) <= 2 * rtol
            iterations.append(int(solution.stats.iterations))
    assert iterations[0] > iterations[2] > iterations[4]
    solver = prnn.Jacobi(chunk_size=2, rtol=0.0, atol=1e-4)
    solution = prnn.solve(step, xs, init, solver=solver)
    assert np.max(np.abs(solution.states - expected)) <= 2e-4
    assert int(solution.stats.iterations) < iterations[0]


def test_nothing_is_kept_of_a_step_that_is_gone():
    """A program lives as long as the function that it was compiled for."""

    def run(i):
        large = jnp.full((256, 1024), float(i))  # 2 MB
        step = lambda h, x: jnp.tanh(h * large[0, 0] + x)  # noqa: E731
        prnn.solve(step, jnp.ones(9), jnp.asarray(0.0), solver=prnn.Sequential())

    def live():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    run(0)
    before = live()
    for i in range(3):
        run(i)
    assert live() <= before + 100_000


def test_settings_are_static():
    """Solvers and solutions pass through transformations; equal solvers compile once."""
    solver = prnn.Newton(chunk_size=3)
    assert hash(solver) == hash(prnn.Newton(chunk_size=3))
    assert dataclasses.replace(solver, chunk_size=4) != solver
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.chunk_size = 4  # pyright: ignore[reportAttributeAccessIssue]
    traces = []

    def step(h, x):
        traces.append(None)
        return 0.5 * h + x

    for _ in range(2):
        prnn.solve(step, jnp.ones(9), jnp.asarray(0.0), solver=prnn.Newton(chunk_size=3))
        count = len(traces)
        prnn.solve(step, jnp.zeros(9), jnp.asarray(1.0), solver=prnn.Newton(chunk_size=3))
        assert len(traces) == count
