"""What tells the methods apart: linearizations, damping, exact scans, speculation, reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import scan

import pararnn as prnn
from pararnn.solvers._damped import damped_correction

L, D = 120, 4


def _elman(gain):
    w = gain * jax.random.normal(jax.random.key(0), (D, D)) / D**0.5
    xs = jax.random.normal(jax.random.key(1), (L, D))
    return (lambda h, x: jnp.tanh(w @ h + x)), xs, jnp.zeros(D)


@pytest.mark.parametrize(
    "solver",
    [
        prnn.QuasiNewton(chunk_size=1),
        prnn.QuasiNewton(chunk_size=7),
        prnn.QuasiNewton(block_size=2, chunk_size=3),
        prnn.ElementwiseNewton(chunk_size=4),
        prnn.LevenbergMarquardt(chunk_size=1),
        prnn.LevenbergMarquardt(chunk_size=5, diagonal=True),
        prnn.LevenbergMarquardt(chunk_size=1, damping=1e-6),
        prnn.LevenbergMarquardt(chunk_size=4, linear_method=prnn.scans.Associative()),
        prnn.Speculative(chunk_size=8, num_candidates=3),
        prnn.Speculative(chunk_size=8, num_candidates=3, corrector=prnn.Jacobi()),
    ],
    ids=repr,
)
def test_converges_without_the_sequential_finish(solver):
    step, xs, init = _elman(0.6)
    solution = prnn.solve(step, xs, init, solver=solver)
    np.testing.assert_allclose(solution.states, scan(step, xs, init), atol=1e-10)
    assert not solution.stats.fallback
    assert solution.result == prnn.RESULTS.successful


def test_picard_solves_small_steps():
    xs = jax.random.normal(jax.random.key(0), (L, D))

    def step(h, x):
        return h + 1e-3 * (jnp.sin(h) + x)

    solution = prnn.solve(step, xs, jnp.ones(D), solver=prnn.Picard())
    np.testing.assert_allclose(solution.states, scan(step, xs, jnp.ones(D)), atol=1e-10)
    assert not solution.stats.fallback and solution.stats.iterations <= 12


def test_quasi_newton_on_a_diagonal_step_is_newton():
    a = jnp.linspace(0.1, 0.9, D)
    xs = jax.random.normal(jax.random.key(0), (L, D))
    solutions = [
        prnn.solve(lambda h, x: jnp.tanh(a * h + x), xs, jnp.zeros(D), solver=solver)
        for solver in (prnn.QuasiNewton(chunk_size=2), prnn.Newton(chunk_size=2))
    ]
    assert solutions[0].stats.iterations == solutions[1].stats.iterations
    np.testing.assert_array_equal(solutions[0].states, solutions[1].states)


def test_quasi_newton_rejects_blocks_that_do_not_fit():
    step, xs, init = _elman(0.5)
    with pytest.raises(ValueError, match="`block_size` must divide"):
        prnn.solve(step, xs, init, solver=prnn.QuasiNewton(block_size=3))
    with pytest.raises(ValueError, match="`block_size`"):
        prnn.QuasiNewton(block_size=0)


# --- Levenberg–Marquardt ----------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("scan", [prnn.scans.Sequential(), prnn.scans.Associative()])
@pytest.mark.parametrize(
    "structure",
    [prnn.Diagonal(), prnn.BlockDiagonal(((0, 2), (1,), (3, 4, 5))), prnn.Dense()],
    ids=lambda s: type(s).__name__,
)
def test_damped_correction_against_normal_equations(structure, scan, damping):
    n, size = 5, 6
    rng = np.random.default_rng(0)
    full = rng.normal(size=(n, size, size))
    seeds = structure.seeds(size, np.dtype("float64"))
    full = np.asarray(
        structure.to_dense(structure.compress(jnp.einsum("nij,kj->nki", full, seeds)))
    )
    matrices = structure.compress(jnp.einsum("nij,kj->nki", full, seeds))
    defects = rng.normal(size=(n, size))
    m = np.eye(n * size)
    for i in range(1, n):
        m[i * size : (i + 1) * size, (i - 1) * size : i * size] = -full[i]
    lhs = m.T @ m + damping * np.eye(n * size)
    expected = np.linalg.solve(lhs, m.T @ defects.reshape(-1)).reshape(n, size)
    got = damped_correction(structure, matrices, jnp.asarray(defects), jnp.asarray(damping), scan)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_adaptive_damping_is_close_to_the_best_constant():
    size, length = 8, 512
    keys = jax.random.split(jax.random.key(0), 3)
    limit = size**-0.5
    w_x = jax.random.uniform(keys[0], (3 * size, size), minval=-limit, maxval=limit)
    w_h = 3 * jax.random.uniform(keys[1], (3 * size, size), minval=-limit, maxval=limit)
    xs = jax.random.normal(keys[2], (length, size))

    def step(h, x):
        (u_r, u_z, u_n), (h_r, h_z, h_n) = jnp.split(w_x @ x, 3), jnp.split(w_h @ h, 3)
        r, z = jax.nn.sigmoid(u_r + h_r), jax.nn.sigmoid(u_z + h_z)
        n = jnp.tanh(u_n + r * h_n)
        return n + z * (h - n)

    def iterations(damping):
        solver = prnn.LevenbergMarquardt(chunk_size=1, damping=damping, max_iters=60)
        solution = prnn.solve(step, xs, jnp.zeros(size), solver=solver)
        return 1000 if solution.stats.fallback else int(solution.stats.iterations)

    best = min(iterations(damping) for damping in (1e-8, 1e-4, 1e-2))
    assert iterations(None) <= 1.5 * best


# --- exact scans ------------------------------------------------------------------------------


class _Clamp(prnn.AbstractAlgebra):
    def element(self, u):
        return u

    def constant(self, state):
        return state, state

    def compose(self, later, earlier):
        (r2, s2), (r1, s1) = later, earlier
        return jnp.minimum(r2, r1), jnp.maximum(jnp.minimum(r2, s1), s2)

    def apply(self, element, state):
        return jnp.maximum(jnp.minimum(element[0], state), element[1])


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("kind", ["affine", "diagonal", "clamp"])
def test_associativescan(kind, with_reset):
    xs = jax.random.normal(jax.random.key(0), (L, D))
    w = 0.7 * jax.random.normal(jax.random.key(1), (D, D)) / D**0.5
    steps = {
        "affine": (lambda h, x: w @ h + x, xs, None),
        "diagonal": (lambda h, x: jax.nn.sigmoid(x) * h + x, xs, None),
        "clamp": (
            lambda h, u: jnp.maximum(jnp.minimum(u[0], h), u[1]),
            (xs + 1, xs[::-1] - 1),
            _Clamp(),
        ),
    }
    step, inputs, algebra = steps[kind]
    reset = jnp.arange(L) % 11 == 3 if with_reset else None
    init, reset_state = jnp.ones(D), 0.3 * jnp.ones(D)

    def loss(inputs, init, solver):
        solution = prnn.solve(
            step, inputs, init, solver=solver, reset=reset, reset_state=reset_state
        )
        return jnp.sum(jnp.sin(solution.states)), solution.stats

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (value, stats), gradient = both(inputs, init, prnn.AssociativeScan(algebra=algebra))
    (expected, _), expected_gradient = both(inputs, init, prnn.Sequential())
    # The first solves it; a second may find that nothing is missing.
    assert 1 <= stats.iterations <= 2 and not stats.fallback
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_associative_scan_rejects_nonlinear_steps():
    step, xs, init = _elman(0.5)
    with pytest.raises(ValueError, match="affine in the state"):
        prnn.solve(step, xs, init, solver=prnn.AssociativeScan())


def test_associative_scan_checks_a_hidden_nonlinearity():
    def step(h, x):
        return 0.5 * h + jax.lax.stop_gradient(jnp.sin(h)) + x

    xs = jax.random.normal(jax.random.key(0), (L, D))
    solution = prnn.solve(step, xs, jnp.zeros(D), solver=prnn.AssociativeScan())
    np.testing.assert_allclose(solution.states, scan(step, xs, jnp.zeros(D)), atol=1e-12)
    assert solution.stats.fallback


# --- speculation ------------------------------------------------------------------------------


def _latch(length, noise=0.0):
    signs = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (length,)), 1.0, -1.0)
    xs = jnp.stack([signs, noise * jax.random.normal(jax.random.key(1), (length,))], axis=1)
    return (lambda h, x: jnp.tanh(3 * h * x[0] + x[1])), xs, jnp.ones(3) * jnp.array([1.0, -1, 1])


@pytest.mark.parametrize("linear_method", [prnn.scans.Sequential(), prnn.scans.Associative()])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_speculation_solves_a_latch_that_newton_cannot(noise, linear_method):
    step, xs, init = _latch(512, noise)
    init = init[:1]
    solver = prnn.Speculative(chunk_size=8, num_candidates=4, linear_method=linear_method)
    solution = prnn.solve(step, xs, init, solver=solver)
    np.testing.assert_allclose(solution.states, scan(step, xs, init), atol=1e-10)
    assert not solution.stats.fallback
    assert solution.stats.sequential_steps <= 8 * 10
    newton = prnn.solve(step, xs, init, solver=prnn.Newton(chunk_size=8))
    assert newton.stats.sequential_steps > 400


def test_speculation_without_enough_candidates_is_right_all_the_same():
    step, xs, init = _latch(256)  # three independent latches: eight basins
    solver = prnn.Speculative(chunk_size=8, num_candidates=2)
    solution = prnn.solve(step, xs, init, solver=solver)
    np.testing.assert_allclose(solution.states, scan(step, xs, init), atol=1e-10)


def test_speculation_under_jit_vmap_grad():
    step, xs, init = _latch(64)

    def loss(xs, solver):
        states = prnn.solve(step, xs, init, solver=solver).states
        return jnp.sum(jnp.sin(states))

    batch = jnp.stack([xs, -xs])
    gradient = jax.jit(jax.vmap(jax.grad(loss), (0, None)), static_argnums=1)
    got = gradient(batch, prnn.Speculative(chunk_size=4, num_candidates=8))
    np.testing.assert_allclose(got, gradient(batch, prnn.Sequential()), atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5, 17])
def test_speculation_at_small_sizes(length):
    step, xs, init = _latch(length)
    solver = prnn.Speculative(chunk_size=2, num_candidates=50)
    solution = prnn.solve(step, xs, init, solver=solver)
    np.testing.assert_allclose(solution.states, scan(step, xs, init), atol=1e-10)


def test_speculation_rejects_bad_arguments():
    with pytest.raises(TypeError, match="corrector"):
        prnn.Speculative(corrector=prnn.Sequential())
    with pytest.raises(ValueError, match="num_candidates"):
        prnn.Speculative(num_candidates=0)


# --- reports ----------------------------------------------------------------------------------


def test_verbose_prints_under_jit(capfd):
    step, xs, init = _elman(0.5)
    solver = prnn.Newton(chunk_size=4)
    solution = jax.jit(lambda xs: prnn.solve(step, xs, init, solver=solver, verbose=True))(xs)
    jax.block_until_ready(solution.states)
    jax.effects_barrier()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == solution.stats.iterations
    assert "30/30 chunks at rest" in lines[-1]


def test_verbose_calls_a_function():
    step, xs, init = _elman(0.5)
    calls = []
    solution = prnn.solve(
        step, xs, init, solver=prnn.Jacobi(chunk_size=8), verbose=lambda *args: calls.append(args)
    )
    jax.effects_barrier()
    assert [c[0] for c in sorted(calls)] == list(range(1, int(solution.stats.iterations) + 1))
    with pytest.raises(TypeError, match="verbose"):
        prnn.solve(step, xs, init, verbose="yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("platform, kind", [("cpu", prnn.Sequential), ("gpu", prnn.Newton)])
def test_select_solver_says_why(platform, kind):
    step, xs, init = _elman(0.5)
    solver, reason = prnn.select_solver(step, xs, init, platform=platform)
    assert isinstance(solver, kind) and len(reason) > 20
    affine, _ = prnn.select_solver(lambda h, x: 0.5 * h + x, xs, init, platform="gpu")
    assert isinstance(affine, prnn.AssociativeScan)
