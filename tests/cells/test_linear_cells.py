"""What is particular to the linear cells: how they start, and that they bear extreme inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from linear_cells import legendre_memory, softplus

import pararnn as prnn
from pararnn.cells._lmu import _discretised
from pararnn.cells._rglru import _complement
from pararnn.cells._zero_order_hold import gain

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
CELLS = {
    "S5": lambda **k: prnn.S5(4, 6, **k),
    "S4D": lambda **k: prnn.S4D(4, 3, **k),
    "RGLRU": lambda **k: prnn.RGLRU(4, num_heads=2, **k),
    "MinGRU": lambda **k: prnn.MinGRU(4, 6, **k),
    "MinLSTM": lambda **k: prnn.MinLSTM(4, 6, **k),
    "SelectiveSSM": lambda **k: prnn.SelectiveSSM(4, 3, **k),
    "LinearLMU": lambda **k: prnn.LinearLMU(4, 6, 5, 7.5, memory_size=2, **k),
    "LMU": lambda **k: prnn.LMU(4, 6, 5, 7.5, **k),
    "PLSTM": lambda **k: prnn.PLSTM(4, 2, 3, 2, **k),
    "DeltaNet": lambda **k: prnn.DeltaNet(4, 2, 3, 5, **k),
    "DeltaProduct": lambda **k: prnn.DeltaProduct(4, 2, 3, 5, **k),
    "TTTLinear": lambda **k: prnn.TTTLinear(4, 2, 3, 5, **k),
    "Aaren": lambda **k: prnn.Aaren(4, 2, 3, 5, **k),
    "GatedLinearAttention": lambda **k: prnn.GatedLinearAttention(4, 2, 3, 5, gate_rank=2, **k),
    "Retention": lambda **k: prnn.Retention(4, 2, 4, 3, **k),
    "Mamba2": lambda **k: prnn.Mamba2(4, 2, 3, 5, **k),
    "Based": lambda **k: prnn.Based(4, 2, 2, 3, **k),
    "MLSTM": lambda **k: prnn.MLSTM(4, 2, 3, 5, **k),
}


def close(got, expected, tol=1e-14):
    jtu.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), got, expected)


@pytest.mark.parametrize("name", CELLS)
def test_extreme_inputs(name):
    """Values and all gradients are finite where every gate is closed or open to the last bit."""
    cell = CELLS[name](dtype=jnp.float32, key=KEY)
    rng = np.random.default_rng(0)
    signs = jnp.asarray(np.sign(rng.standard_normal((9, 4))), jnp.float32)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradient(arguments):
        cell, xs = arguments
        ys, _ = prnn.RNN(cell)(xs, throw=False)
        return jnp.sum(jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)) * ys.ravel()), ys

    for scale in (0.0, 1.0, 1e2, 1e4):
        grads, ys = gradient((cell, scale * signs))
        assert all(jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves((grads, ys)))


@pytest.mark.parametrize("name", [name for name in CELLS if name != "LMU"])
def test_one_pass_is_the_scan(name):
    """The steps are recognised as affine, or have an algebra: nothing iterates."""
    cell = CELLS[name](key=KEY)
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((13, 4)))

    @eqx.filter_jit
    def states(cell, xs):
        solvers = prnn.AssociativeScan(), prnn.Sequential()
        return [prnn.RNN(cell, solver=solver).solve(xs, throw=False).states for solver in solvers]

    jtu.tree_map(lambda a, b: close(a, b, 1e-12), *states(cell, xs))
    many = jax.ShapeDtypeStruct((500, 4), float)
    solver, _ = prnn.select_solver(cell, many, platform="gpu")
    assert isinstance(solver, prnn.AssociativeScan)


# One of each kind; all others differ from one of these by what `test_cells.py` checks, in the same
# ways: the values, gradients, the structure, and locality in time. Streaming follows, for all.
KINDS = ("S5", "SelectiveSSM", "LinearLMU", "LMU", "PLSTM", "DeltaProduct", "Aaren", "MLSTM")


@pytest.mark.parametrize("name", KINDS)
def test_promises(name):
    """Values, gradients, the structure, locality in time, and streaming."""
    xs = jnp.asarray(np.random.default_rng(2).standard_normal((12, 4)))
    found = prnn.verify(CELLS[name](key=KEY), xs, solver=prnn.Newton(chunk_size=4))
    assert found and found.broken_promises == ()


@pytest.mark.parametrize("name", CELLS)
def test_packed_sequences(name):
    """Two sequences in one, with padding between, are as each by itself, and step by step."""
    rnn = prnn.RNN(CELLS[name](key=KEY))
    xs = jnp.asarray(np.random.default_rng(3).standard_normal((12, 4)))
    reset = np.isin(np.arange(12), (0, 7))
    mask = ~np.isin(np.arange(12), (5, 6))
    run = eqx.filter_jit(lambda rnn, xs, **k: rnn(xs, throw=False, **k))
    ys, final = run(rnn, xs, reset=reset, mask=mask)
    first, second = run(rnn, xs[:5]), run(rnn, xs[7:])
    close(ys, jnp.concatenate([first[0], jnp.zeros((2, ys.shape[1])), second[0]]), 1e-12)
    close(final, second[1], 1e-12)

    @eqx.filter_jit
    def stream(rnn, xs):
        step = lambda state, x: rnn.step(state, x)[::-1]  # noqa: E731
        return jax.lax.scan(step, rnn.init_state(), xs)

    streamed, ys = stream(rnn, xs[:5])
    close((ys, streamed), first, 1e-12)


# --- state-space models -----------------------------------------------------------------------


def test_rates_of_state_space_models():
    s5, s4d = prnn.S5(3, 200, key=KEY), prnn.S4D(200, 5, key=KEY)
    for cell, size in ((s5, 200), (s4d, 5)):
        expected = np.broadcast_to(-0.5 + 1j * np.pi * np.arange(size), cell.nu.shape)
        close(-np.exp(np.asarray(cell.nu)) + 1j * np.asarray(cell.omega), expected)
        log_step = np.ravel(cell.log_step)
        assert log_step.shape == (200,)
        assert np.all((np.log(1e-3) <= log_step) & (log_step <= np.log(0.1)))
        assert log_step.min() < -6.5 and log_step.max() > -2.7
    assert s5.skip.shape == (3,) and prnn.S5(3, 4, 5, key=KEY).skip.shape == (5, 3)


def test_gain_of_slow_states():
    """In float32, where the exponent is near 0, or a multiple of 2πi."""
    nu = np.log([0.5, 1e-3, 1e-6, 0.5, 3.0])
    omega = np.array([0.0, 1e-3, 0.0, np.pi, 40.0])
    log_step = np.log([1e-3, 1e-3, 1e-2, 1e-3, 0.1])
    low = [x.astype(np.float32) for x in (nu, omega, log_step)]
    exact = [x.astype(np.longdouble) for x in low]
    eigenvalues, step = -np.exp(exact[0]) + 1j * exact[1], np.exp(exact[2])
    expected = (np.exp(eigenvalues * step) - 1) / eigenvalues
    got = np.asarray(gain(*map(jnp.asarray, low)), complex)
    close(got / expected.astype(complex), np.ones(5), 1e-6)


def test_selective_ssm_starts_like_mamba():
    cell = prnn.SelectiveSSM(40, key=KEY)
    assert cell.weight_rank.shape == (3, 40) and cell.weight_conv.shape == (4, 40)
    close(np.exp(cell.a_log), np.tile(np.arange(1.0, 17.0), (40, 1)))
    step = softplus(cell.bias_dt)
    assert np.all((step > 0.99e-3) & (step < 1.01e-1)) and jnp.array_equal(cell.skip, jnp.ones(40))


def test_selective_ssm_keeps_no_matrix_of_the_states_size_per_step():
    cell = prnn.SelectiveSSM(40, 16, key=KEY)
    us = eqx.filter_eval_shape(cell.project, jnp.zeros((9, 40)))
    assert sum(u.size for u in us) == 9 * (40 + 16 + 16 + 40)


# --- gated units ------------------------------------------------------------------------------


def test_rglru_starts_with_long_memory():
    kept = np.exp(-8 * softplus(np.asarray(prnn.RGLRU(300, key=KEY).decay)))
    assert np.all((kept > 0.9) & (kept < 0.999)) and kept.min() < 0.91 and kept.max() > 0.99


def test_complement():
    rate = np.geomspace(1e-12, 100, 30, dtype=np.float32)
    expected = np.sqrt(-np.expm1(-2 * rate.astype(float)))
    close(np.asarray(_complement(jnp.asarray(rate)), float) / expected, np.ones(30), 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_complement_of_a_closed_gate(dtype):
    """Derivatives through a gate that underflows, or is as small as numbers get, are finite."""

    def through_gate(raw):
        return _complement(jax.nn.sigmoid(raw))

    both = jax.jit(lambda raw, one: jax.jvp(jax.grad(through_gate), (raw,), (one,)))
    for raw in (-20.0, -43.0, -60.0, -87.0, -1e4):
        raw = jnp.asarray(raw, dtype)
        first, second = both(raw, jnp.ones_like(raw))
        assert jnp.isfinite(first) and jnp.isfinite(second)
        close(first, through_gate(raw) / 2, 1e-8)  # that of the root of exp(raw)


def test_min_lstm_with_both_gates_closed():
    """Their quotient decides, though both underflow."""
    cell = prnn.MinLSTM(4, 6, dtype=jnp.float32, key=KEY)
    bias = jnp.concatenate([jnp.full(6, -1e4), jnp.full(6, -1e4 + 1), jnp.ones(6)])
    cell = eqx.tree_at(lambda c: c.bias, cell, bias.astype(jnp.float32))
    kept, written = cell.project(jnp.zeros((1, 4), jnp.float32))
    close(kept, np.full((1, 6), 1 / (1 + np.e)), 1e-6)
    close(written, np.full((1, 6), np.e / (1 + np.e)), 1e-6)


# --- the Legendre memory ----------------------------------------------------------------------


@pytest.mark.parametrize("order, theta", [(1, 3.0), (6, 4.5), (12, 300.0)])
def test_legendre_discretisation(order, theta):
    for got, expected in zip(
        _discretised(order, theta), legendre_memory(order, theta), strict=True
    ):
        close(got, expected, 1e-9)


@pytest.mark.parametrize("order, theta", [(64, 100.0), (256, 784.0), (256, 20.0)])
def test_large_legendre_memories_are_stable(order, theta):
    A, B = _discretised(order, theta)
    assert np.all(np.isfinite(A)) and np.all(np.isfinite(B))
    assert np.abs(np.linalg.eigvals(A)).max() < 1
    # A constant is remembered as itself: the first polynomial.
    close(np.linalg.solve(np.eye(order) - A, B), np.eye(order)[0], 1e-6)


def test_memory_is_a_window():
    """The Legendre polynomials over the window, summed with the memory as coefficients, give the
    inputs of up to θ steps ago."""
    order, theta, length = 12, 60.0, 200
    cell = prnn.LinearLMU(1, 2, order, theta, key=KEY)
    cell = eqx.tree_at(lambda c: c.weight_u, cell, jnp.ones((1, 1)))
    signal = lambda t: np.sin(2 * np.pi * t / 80) + 0.3 * np.cos(t / 9)  # noqa: E731
    xs = jnp.asarray(signal(np.arange(length)))[:, None]
    memory = np.asarray(prnn.RNN(cell).solve(xs, throw=False).final[0])
    for delay in (0.0, 15.0, 30.0, 60.0):
        decoded = np.polynomial.legendre.legval(2 * delay / theta - 1, memory)
        # An input counts for the step before its time: half a step of delay, on average.
        assert abs(decoded - signal(length - 1 - delay + 0.5)) < 0.02


def test_memory_is_not_trained():
    """No parameter is that of the memory, whatever the dtype of the others."""
    cell = prnn.LinearLMU(4, 6, 5, 7, memory_size=2, dtype=jnp.bfloat16, key=KEY)
    shapes = [x.shape for x in jtu.tree_leaves(eqx.filter(cell, eqx.is_array))]
    assert shapes == [(2, 4), (6, 10), (6, 4), (6,)]
    state, u = cell.init_state() + 1, [jnp.zeros(2, jnp.float32)]
    A, _ = _discretised(5, 7.0)
    close(cell.step(state, u), np.tile(A.sum(1), (2, 1)), 1e-6)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prnn.S5(4, 0, key=KEY), "`hidden_size` must be at least 1; got 0"),
        (lambda: prnn.S5(4, 6, 0, key=KEY), "`output_size` must be at least 1"),
        (lambda: prnn.S4D(4, 0, key=KEY), "`state_size` must be at least 1"),
        (lambda: prnn.RGLRU(6, num_heads=4, key=KEY), "must divide `input_size`; got 4 for 6"),
        (lambda: prnn.MinGRU(0, 6, key=KEY), "`input_size` must be at least 1"),
        (lambda: prnn.MinLSTM(4, -1, key=KEY), "`hidden_size` must be at least 1; got -1"),
        (lambda: prnn.SelectiveSSM(0, key=KEY), "`input_size` must be at least 1"),
        (lambda: prnn.SelectiveSSM(4, dt_rank=0, key=KEY), "`dt_rank` must be at least 1"),
        (lambda: prnn.SelectiveSSM(4, conv_width=-1, key=KEY), "`conv_width` must be at least 1"),
        (lambda: prnn.LinearLMU(4, 6, 5, 0.0, key=KEY), "`theta` must be positive and finite"),
        (lambda: prnn.LinearLMU(4, 6, 5, 7, memory_size=0, key=KEY), "`memory_size`"),
        (lambda: prnn.LMU(4, 6, 0, 7.0, key=KEY), "`order` must be at least 1"),
        (lambda: prnn.PLSTM(4, 2, 0, 2, key=KEY), "`key_size` must be at least 1"),
        (lambda: prnn.LMU(4, 6, 5, float("inf"), key=KEY), "`theta` must be positive and finite"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("theta", ["7", True, None])
def test_theta_is_a_number(theta):
    for make in (prnn.LMU, prnn.LinearLMU):
        with pytest.raises(TypeError, match="`theta` must be a Python number; got"):
            make(4, 6, 5, theta, key=KEY)
