"""The elementwise part of a step's Jacobian, and the solver that uses nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import error, scan, trained

import pararnn as prnn
from pararnn._recurrence import Recurrence
from pararnn.jaxprs._counting import loop_turns
from pararnn.jaxprs._elementwise import elementwise_tangents

D, L = 6, 40
KEY = jax.random.key(0)
W = jax.random.normal(jax.random.key(1), (D, D)) / D
XS = jax.random.normal(jax.random.key(2), (L, D))


def part(step, init=None, xs=XS):
    return Recurrence(step, xs, jnp.zeros(D) if init is None else init).elementwise


# --- which part that is -------------------------------------------------------------------------


def gru(h, x):
    z = jax.nn.sigmoid(W @ h + x)
    n = jnp.tanh(x - z * (W @ h))
    return n + z * (h - n)


def test_gates_remain_of_a_gated_recurrent_unit():
    h, x, v = jax.random.normal(KEY, (3, D))
    value, tangent = jax.jvp(lambda h: elementwise_tangents(gru)(h, x), (h,), (v,))
    np.testing.assert_array_equal(value, gru(h, x))
    np.testing.assert_allclose(tangent, jax.nn.sigmoid(W @ h + x) * v, rtol=1e-12)
    assert part(gru) == (prnn.Diagonal(), False)


@pytest.mark.parametrize(
    "cell, size",
    [(prnn.GRU, 1), (prnn.LSTM, 2), (prnn.SLSTM, 4)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_cell_has_a_block_for_each_unit(cell, size):
    cell = cell(3, 8, key=KEY)
    found = part(cell.step, cell.init_state(), cell.project(jnp.ones((L, 3))))
    assert not found.is_all
    assert found.structure.num_seeds(8 * size) <= size
    # Each unit by itself: what is pushed reaches no other unit.
    labels = found.structure.labels(8 * size)
    assert len(set(labels.tolist())) in (8, 8 * size)


def test_nothing_remains_of_a_step_without_gates():
    assert part(lambda h, x: jnp.tanh(W @ h + x)) == (None, False)
    # The new state does not depend on the old one at all.
    assert part(lambda h, x: x) == (None, True)


def test_a_step_that_mixes_nothing_is_solved_by_newtons_method():
    def step(h, x):
        return jnp.tanh(0.9 * jnp.flip(jnp.flip(h)) + x)

    assert part(step) == (prnn.Diagonal(), True)
    solvers = prnn.ElementwiseNewton(chunk_size=4), prnn.Newton(chunk_size=4)
    a, b = (prnn.solve(step, XS, jnp.zeros(D), solver=solver) for solver in solvers)
    np.testing.assert_array_equal(a.states, b.states)
    assert a.stats.iterations == b.stats.iterations


def _custom(h, x):
    """A custom derivative without products is kept, one with products is entered."""

    @jax.custom_jvp
    def double(h):
        return 2 * h

    double.defjvp(lambda primals, tangents: (double(*primals), 3 * tangents[0]))

    @jax.custom_jvp
    def product(h):
        return W @ h

    product.defjvp(lambda primals, tangents: (product(*primals), W @ tangents[0]))
    return double(h) + product(h) + x


def _inner_scan(h, x):
    """A loop over the elements mixes them, one over other things does not."""
    total = jax.lax.scan(lambda c, h: (c + h, None), 0.0, h)[0]
    return jax.lax.scan(lambda h, _: (3 * h, None), h, None, length=1)[0] + total + x


MIXING = {
    "product": lambda h, x: 3 * h + W @ h,
    "product in a function": lambda h, x: 3 * h + jax.jit(jnp.dot)(W, h),
    "recomputed product": lambda h, x: 3 * h + jax.checkpoint(jnp.dot)(W, h),
    "einsum": lambda h, x: 3 * h + jnp.einsum("ij,j->i", W, h),
    "sum of products": lambda h, x: 3 * h + jnp.sum(W * jnp.expand_dims(h, 0), axis=1),
    "mean": lambda h, x: 3 * h - jnp.mean(h),
    "maximum": lambda h, x: 3 * h - jnp.max(h),
    "sum of exponentials": lambda h, x: 3 * h + x / jnp.sum(jnp.exp(h)),
    "cumulative": lambda h, x: 3 * h + jnp.cumsum(h),
    "sort": lambda h, x: 3 * h + jnp.sort(h),
    "convolution": lambda h, x: 3 * h + jnp.convolve(h, jnp.ones(3), mode="same"),
    "branch": lambda h, x: 3 * h + jax.lax.cond(x[0] > 0, lambda h: W @ h, jnp.zeros_like, h),
    "loop": lambda h, x: 3 * h + jax.lax.fori_loop(0, 2, lambda _, h: W @ h, h),
    "custom derivative": _custom,
    "inner scan": _inner_scan,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_held(name):
    step = MIXING[name]
    h, x, v = jax.random.normal(KEY, (3, D))
    value, tangent = jax.jvp(lambda h: elementwise_tangents(step)(h, x), (h,), (v,))
    np.testing.assert_allclose(value, step(h, x), rtol=1e-6)
    np.testing.assert_array_equal(tangent, 3 * v)
    assert part(step) == (prnn.Diagonal(), False)


# --- the solver ---------------------------------------------------------------------------------


def test_the_derivative_is_exact_however_much_the_step_mixes():
    """In float64, against differentiation through the scan: the dropped part is as large as what
    is kept, and must not be missing in the derivative."""
    weights = 3 * W

    def step(weights, h, x):
        z = jax.nn.sigmoid(weights @ h + x)
        return z * h + (1 - z) * jnp.tanh(weights @ (z * h) + x)

    def loss(states):
        return jnp.sum(jnp.sin(jnp.arange(L * D)).reshape(L, D) * states)

    def ours(weights, xs):
        solver = prnn.ElementwiseNewton(chunk_size=4)
        solution = prnn.solve(
            functools.partial(step, weights),
            xs,
            jnp.zeros(D, xs.dtype),
            solver=solver,
            adjoint=solver,
        )
        return loss(solution.states)

    def theirs(weights, xs):
        return loss(scan(functools.partial(step, weights), xs, jnp.zeros(D, xs.dtype)))

    got, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(weights, XS) for f in (ours, theirs))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_an_accelerator_asks_after_eight_iterations():
    recurrence = Recurrence(gru, XS, jnp.zeros(D))
    solver = prnn.ElementwiseNewton().resolved(recurrence, "gpu")
    assert (solver.chunk_size, solver.min_iters, solver.overlap) == (16, 8, 0)
    assert prnn.ElementwiseNewton().resolved(recurrence, "cpu").min_iters == 0
    asked = prnn.ElementwiseNewton(min_iters=2, chunk_size=8).resolved(recurrence, "gpu")
    assert (asked.chunk_size, asked.min_iters) == (8, 2)


def test_corrects_what_speculation_finds():
    solver = prnn.Speculative(chunk_size=8, num_candidates=3, corrector=prnn.ElementwiseNewton())
    solution = prnn.solve(gru, XS, jnp.zeros(D), solver=solver)
    np.testing.assert_allclose(solution.states, scan(gru, XS, jnp.zeros(D)), atol=1e-6)
    assert not solution.stats.fallback


# --- trained networks ---------------------------------------------------------------------------

# The most steps on the critical path: forward, and of the derivative.
PATHS = {"gru": (256, 320), "gru_early": (192, 200), "lstm": (192, 200), "elman": (160, 160)}


@pytest.mark.parametrize("solver", [prnn.ElementwiseNewton(), prnn.ElementwiseNewton(min_iters=8)])
@pytest.mark.parametrize(
    "length", [1024, pytest.param(16_384, marks=pytest.mark.slow)], ids="L={}".format
)
@pytest.mark.parametrize("name", PATHS)
def test_trained_networks(name, length, solver):
    system, states, rounding = trained(name, length)
    solution = jax.jit(
        lambda xs: prnn.solve(system.step, xs, system.init, solver=solver, throw=False)
    )(system.xs)
    assert solution.result == prnn.RESULTS.successful
    assert not solution.stats.fallback
    # No worse than the rounding of a sequential run, several times.
    assert error(solution.states, states) <= max(4 * rounding, 1e-5)
    least = 0 if solver.min_iters is None else (1 + solver.min_iters + 3) * 16
    assert int(solution.stats.sequential_steps) <= max(least, PATHS[name][0])


@pytest.mark.parametrize(
    "length", [1024, pytest.param(16_384, marks=pytest.mark.slow)], ids="L={}".format
)
@pytest.mark.parametrize("name", PATHS)
def test_derivatives_of_trained_networks(name, length):
    system, states, _ = trained(name, length)
    weights = jax.tree.map(lambda h: jax.random.normal(KEY, h.shape, h.dtype), states)

    def loss(xs, solve):
        pairs = zip(jax.tree.leaves(weights), jax.tree.leaves(solve(xs)), strict=True)
        return sum(jnp.sum(w * h) for w, h in pairs)

    def solve(xs):
        adjoint = prnn.ElementwiseNewton()
        options = {"solver": prnn.Sequential(), "adjoint": adjoint, "throw": False}
        return prnn.solve(system.step, xs, system.init, **options).states

    def scanned(xs):
        return scan(system.step, xs, system.init)

    gradient = jax.grad(functools.partial(loss, solve=solve))
    expected = jax.jit(jax.grad(functools.partial(loss, solve=scanned)))(system.xs)
    assert error(jax.jit(gradient)(system.xs), expected) <= 1e-5
    turns = [n for path, n in loop_turns(gradient, system.xs) if "pararnn_iterations" in path]
    (iterations,) = turns
    assert 16 * (iterations + 1) <= PATHS[name][1]


def test_a_network_that_tracks_a_state_costs_little_more_than_its_steps():
    system, states, _ = trained("gru_s3", 1024)
    for solver in (prnn.ElementwiseNewton(), prnn.ElementwiseNewton(min_iters=8)):
        solution = prnn.solve(system.step, system.xs, system.init, solver=solver)
        assert error(solution.states, states) <= 1e-5
        assert solution.stats.fallback
        assert int(solution.stats.sequential_steps) <= 1.25 * 1024


# --- the choice ---------------------------------------------------------------------------------


def gru_cell(hidden_size):
    return prnn.GRU(32, hidden_size, dtype=jnp.float32, key=KEY)


def choice(cell, length, batch_size=None, platform="gpu"):
    xs = jax.ShapeDtypeStruct((length, 32), jnp.float32)
    chosen = [
        select(cell, xs, platform=platform, batch_size=batch_size)
        for select in (prnn.select_solver, prnn.select_adjoint)
    ]
    return [policy for policy, _ in chosen], [reason for _, reason in chosen]


@pytest.mark.parametrize(
    "cell", [gru_cell(64), gru_cell(512), prnn.LSTM(32, 64, dtype=jnp.float32, key=KEY)]
)
def test_an_accelerator_solves_gated_cells_of_any_width(cell):
    (solver, adjoint), reasons = choice(cell, 16_384)
    assert isinstance(solver, prnn.ElementwiseNewton)
    assert isinstance(adjoint.solver, prnn.ElementwiseNewton)
    assert all("ms one after another" in reason for reason in reasons)
    # On a CPU the scan remains.
    (solver, _), _ = choice(cell, 16_384, platform="cpu")
    assert solver == prnn.Sequential()


def test_a_batch_that_fills_the_device_goes_step_by_step():
    cell = gru_cell(1024)
    (solver, adjoint), reasons = choice(cell, 2048, batch_size=64)
    assert solver == prnn.Sequential() and isinstance(adjoint, prnn.adjoints.OnePassAdjoint)
    assert all("2048 steps of 64 sequences" in reason for reason in reasons)


def test_small_blocks_and_short_sequences_keep_their_choice():
    (solver, _), _ = choice(prnn.DiagonalGRU(32, 64, dtype=jnp.float32, key=KEY), 1024)
    assert isinstance(solver, prnn.Newton)
    (solver, _), _ = choice(gru_cell(8), 1024)
    assert isinstance(solver, prnn.Newton)
    (solver, _), _ = choice(gru_cell(256), 32)
    assert solver == prnn.Sequential()


def test_an_immutable_record():
    solver = prnn.ElementwiseNewton(chunk_size=8)
    assert hash(solver) == hash(dataclasses.replace(solver)) and "chunk_size=8" in repr(solver)


def test_the_derivative_of_an_affine_step_is_one_correction():
    cell = prnn.DeltaNet(32, 2, 16, 16, dtype=jnp.float32, key=KEY)
    (_, adjoint), _ = choice(cell, 1024)
    assert isinstance(adjoint.solver, prnn.Newton)
