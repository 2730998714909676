"""Cells that go through a sequence chunk by chunk: their chunks are their steps, and what is
particular to each."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from outer_cells import numpy_mlstm

import pararnn as prnn
from pararnn.cells._chunks_decayed import apply_channels, apply_heads
from pararnn.cells._decay import segment_log_decays

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
INPUTS = 4
# No cell here looks at inputs before its own, so that a plain scan says what a reset is.
CELLS = {
    "GatedLinearAttention": lambda k: prnn.GatedLinearAttention(4, 2, 3, 5, gate_rank=2, **k),
    "Retention": lambda k: prnn.Retention(4, 2, 4, 3, **k),
    "Mamba2": lambda k: prnn.Mamba2(4, 2, 3, 5, conv_width=0, **k),
    "Based": lambda k: prnn.Based(4, 2, 2, 3, **k),
    "MLSTM": lambda k: prnn.MLSTM(4, 2, 3, 5, **k),
}
each_cell = pytest.mark.parametrize("name", CELLS)


def make(name, dtype=jnp.float64):
    """A cell whose gates, where they see the input, go from nearly open to decays of 1e-6."""
    cell = CELLS[name]({"dtype": dtype, "key": KEY})
    rng = np.random.default_rng(5)
    gates = {
        "GatedLinearAttention": [(lambda c: c.weight_alpha, 60)],
        "Mamba2": [(lambda c: c.weight_dt, 3)],
        "MLSTM": [(lambda c: c.weight_f, 8), (lambda c: c.weight_i, 2)],
    }
    for where, scale in gates.get(name, []):
        weight = scale * rng.standard_normal(where(cell).shape)
        cell = eqx.tree_at(where, cell, jnp.asarray(weight, dtype))
    return cell


def inputs(length, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(length).standard_normal((length, INPUTS)), dtype)


def some_state(cell):
    """One that the steps can lead to."""
    xs = inputs(3, cell.weight_o.dtype)
    return by_steps((cell, xs, cell.init_state()), jnp.zeros(3, bool))[1]


def some_resets(length):
    """Also two in a row, and at both ends of a chunk."""
    reset = np.random.default_rng(1).random(length) < 0.03
    reset[[0, 5, 6, 63, 64]] = True
    return jnp.asarray(reset)


def by_steps(arguments, reset):
    """The outputs and the last state by one scan of the step, which starts anew where told to."""
    cell, xs, state = arguments
    us = cell.project(xs)

    def step(h, inputs):
        u, anew = inputs
        h = jtu.tree_map(lambda a, b: jnp.where(anew, a, b), cell.init_state(), h)
        return (cell.step(h, u),) * 2

    final, states = jax.lax.scan(step, state, (us, reset))
    return cell.readout(states, us), final


def by_chunks(arguments, reset=None):
    cell, xs, state = arguments
    return prnn.RNN(cell)(xs, state, reset=reset, throw=False)


def loss(result):
    leaves = jtu.tree_leaves(result)
    waves = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)) for x in leaves]
    pairs = zip(waves, leaves, strict=True)
    return sum(jnp.vdot(wave, jnp.tanh(x.ravel())) for wave, x in pairs)


def with_gradients(run, arguments, reset):
    """The outputs and the last state, and the gradients with respect to parameters, inputs and the
    first state of a function of all of these."""

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradients(arguments):
        result = run(arguments, reset)
        return loss(result), result

    return gradients(arguments)[::-1]


def agree(got, expected, tol):
    """Each array at its own scale."""
    got, expected = (jtu.tree_leaves(eqx.filter(t, eqx.is_array)) for t in (got, expected))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * np.abs(b).max(initial=0))


# --- chunks and steps -------------------------------------------------------------------------


# Chunks of Mamba-2 are those of retention, with decays that see the input, which PLSTM has.
over_kinds = pytest.mark.parametrize("name", [name for name in CELLS if name != "Mamba2"])


@over_kinds
def test_short_sequences(name):
    """Less than a chunk, just one, and one step more."""
    cell = make(name)
    state = some_state(cell)

    @jax.jit
    def both(xs, state):
        arguments = cell, xs, state
        return by_chunks(arguments), by_steps(arguments, jnp.zeros(len(xs), bool))

    for length in (1, 63, 64, 65):
        agree(*both(inputs(length), state), 1e-12)


@each_cell
def test_long_sequences(name):
    """With resets, values and all gradients; from a state and from the beginning."""
    cell, length = make(name), 1000
    reset = some_resets(length)
    arguments = cell, inputs(length), some_state(cell)
    got = with_gradients(by_chunks, arguments, reset)
    agree(got, with_gradients(by_steps, arguments, reset), 1e-10)
    assert all(jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(eqx.filter(got, eqx.is_array)))


@each_cell
def test_float32(name):
    """Against a scan in float64. In float32 the scan is no nearer, but up to ten times further from
    it where large numbers cancel in the norm of a head."""
    cell, length = make(name, jnp.float32), 4097
    arguments = cell, inputs(length, jnp.float32), cell.init_state()
    double = lambda x: x.astype(float) if eqx.is_array(x) else x  # noqa: E731
    results, gradients = with_gradients(by_chunks, arguments, None)
    start = jnp.zeros(length, bool)
    expected = with_gradients(by_steps, jtu.tree_map(double, arguments), start)
    assert {x.dtype for x in jtu.tree_leaves(results)} == {np.dtype("float32")}
    agree(results, expected[0], 1e-5)
    agree(gradients, expected[1], 5e-5)


@over_kinds
def test_transformations(name):
    """Batches, tangents, a layer that is recomputed, and derivatives of derivatives."""
    cell, length = make(name), 70
    xs = inputs(3 * length).reshape(3, length, INPUTS)
    arrays, rest = eqx.partition(cell, eqx.is_array)
    reset = some_resets(length)

    def value(run):
        def of_inputs(arrays, xs):
            cell = eqx.combine(arrays, rest)
            return loss(run((cell, xs, cell.init_state()), reset))

        def curvature(xs):
            gradient = jax.grad(jax.checkpoint(of_inputs))
            return jax.jvp(lambda a: gradient(a, xs), (arrays,), (arrays,))

        return jax.jit(jax.vmap(curvature))(xs)

    agree(value(by_chunks), value(by_steps), 1e-9)


def test_outputs_without_states():
    """A layer holds no array with a state for each step."""
    cell, length = make("GatedLinearAttention"), 640

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for parameter in jtu.tree_leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(parameter, "jaxpr", parameter)
                yield from sizes(inner) if hasattr(inner, "eqns") else ()

    def largest(solver):
        gradient = jax.grad(lambda xs: loss(prnn.RNN(cell, solver=solver)(xs, throw=False)))
        return max(sizes(jax.make_jaxpr(gradient)(inputs(length)).jaxpr))

    states = length * cell.init_state().size
    assert largest(None) < states
    assert largest(prnn.AssociativeScan()) >= states


# --- the mathematics of chunks ----------------------------------------------------------------


def outer_products(state, q, k, v, decay):
    """Step by step in NumPy, with a decay per head or per channel of keys."""
    q, k, v, decay, state = (np.asarray(x) for x in (q, k, v, decay, state))
    heads, ys = range(v.shape[1]), []
    for t in range(len(v)):
        state = np.stack([decay[t, n][:, None] * state[n] for n in heads])
        state = np.stack([state[n] + np.outer(k[t, n], v[t, n]) for n in heads])
        ys.append([q[t, n] @ state[n] for n in heads])
    return state, np.stack(ys)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 35])
def test_closed_gates(length):
    """Decays of 0, and logarithms of -∞: no NaN in values or derivatives."""
    rng = np.random.default_rng(length)
    shapes = [(2, 3, 4)] + [(length, 2, size) for size in (3, 3, 4)]
    state, q, k, v = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    logs = rng.choice([0, -0.1, -14, -800, -1e30, -np.inf], (length, 2, 3))
    reset = jnp.asarray(rng.random(length) < 0.2)
    gone = np.where(np.asarray(reset)[:, None, None], 0, np.exp(logs))

    def value(through, *arguments):
        result = through(*arguments, reset)
        return loss(result), result

    for through, gates, decay in (
        (apply_channels, logs, gone),
        (apply_heads, logs[:, :, 0], gone[:, :, :1]),
    ):
        run = jax.jit(jax.grad(lambda *a, f=through: value(f, *a), range(5), has_aux=True))
        gradients, result = run(state, q, k, v, jnp.asarray(gates))
        agree(result, outer_products(state, q, k, v, decay), 1e-14)
        assert all(jnp.all(jnp.isfinite(g)) for g in gradients)


def test_sums_are_not_differences():
    """After steps that forget all, what comes is as exact as before them."""
    rng = np.random.default_rng(0)
    logs = -rng.uniform(0, 0.1, (64, 1))
    logs[rng.choice(64, 20, replace=False)] = rng.choice([-14, -1e4, -1e9], (20, 1))
    between, incoming = segment_log_decays(jnp.asarray(logs, jnp.float32), None)
    exact = [[logs[s + 1 : t + 1].sum() for s in range(t + 1)] for t in range(64)]
    for t in range(64):
        np.testing.assert_allclose(np.exp(between[0, t, : t + 1]), np.exp(exact[t]), 1e-6, 1e-30)
        assert not np.exp(between[0, t, t + 1 :]).any()
    np.testing.assert_allclose(np.exp(incoming[0]), np.exp(np.cumsum(logs)), 1e-6, 1e-30)


# --- mLSTM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_mlstm_is_the_stabilised_form(gain):
    cell = make("MLSTM")
    for where in (lambda c: c.weight_i, lambda c: c.weight_f):
        cell = eqx.tree_at(where, cell, replace_fn=lambda w: gain * w)
    xs = inputs(300)
    ys, (memory, logs) = eqx.filter_jit(prnn.RNN(cell))(xs, throw=False)
    numbers = jtu.tree_map(lambda x: np.asarray(x) if eqx.is_array(x) else x, cell)
    steps = list(numpy_mlstm(numbers, np.asarray(xs)))
    assert np.all(np.isfinite([y for _, y in steps]))
    agree(ys, np.stack([y for _, y in steps]), 1e-9)
    agree([memory, logs], list(steps[-1][0]), 1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_mlstm_bears_any_input_gate(dtype):
    """No gate is too open or too closed for the first steps, also where a query finds nothing."""
    cell = make("MLSTM", dtype)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradients(arguments):
        cell, xs = arguments
        ys = prnn.RNN(cell)(xs, throw=False)[0]
        return loss(ys), ys

    for gate in (-500.0, -90.0, 0.0, 90.0, 500.0):
        for scale in (0, 1):
            cell = eqx.tree_at(lambda c: c.bias_i, cell, jnp.asarray([gate, -gate], dtype))
            result = gradients((cell, scale * inputs(5, dtype)))
            finite = jtu.tree_map(lambda x: bool(jnp.all(jnp.isfinite(x))), result)
            assert all(jtu.tree_leaves(finite)), (gate, scale)


def test_algebra_of_mlstm():
    """Composition is associative, and that of the maps."""
    cell = make("MLSTM")
    us, state = cell.project(inputs(4)), some_state(cell)
    algebra = cell.algebra
    assert algebra is not None
    a, b, c = (algebra.element(jtu.tree_map(lambda u, t=t: u[t], us)) for t in range(3))
    left = algebra.compose(algebra.compose(c, b), a)
    agree(left, algebra.compose(c, algebra.compose(b, a)), 1e-14)
    _, final = by_steps((cell, inputs(4)[:3], state), np.zeros(3, bool))
    agree(algebra.apply(left, state), final, 1e-14)
    for start in (state, cell.init_state()):
        forgets = algebra.compose(algebra.constant(start), c)
        agree(algebra.apply(forgets, state), start, 0)


# --- how they start ---------------------------------------------------------------------------


def test_initial_gates():
    gla = prnn.GatedLinearAttention(4, 2, 3, 5, key=KEY)
    assert gla.weight_rank.shape == (16, 4)
    log_alpha = gla.project(jnp.zeros((1, 4))).log_decay
    agree(log_alpha, np.full((1, 2, 3), np.log(0.5) / 16), 1e-14)
    mamba = prnn.Mamba2(4, 200, 1, 1, key=KEY)
    rate, step = np.exp(mamba.a_log), np.log1p(np.exp(mamba.bias_dt))
    assert np.all((1 <= rate) & (rate <= 16)) and rate.min() < 2 and rate.max() > 15
    assert np.all((step > 0.99e-3) & (step < 1.01e-1))
    mlstm = prnn.MLSTM(4, 4, 3, 5, key=KEY)
    assert mlstm.bias_f.tolist() == [3, 4, 5, 6] and not mlstm.weight_f.any()


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prnn.GatedLinearAttention(4, 0, 3, 5, key=KEY), "`num_heads` must be at least 1"),
        (lambda: prnn.GatedLinearAttention(4, 2, 3, 5, gate_rank=0, key=KEY), "`gate_rank`"),
        (lambda: prnn.Retention(4, 2, 3, 5, key=KEY), "`key_size` must be even, .*; got 3"),
        (lambda: prnn.Retention(4, 2, 4, 5, norm_eps=0.0, key=KEY), "`norm_eps` must be positive"),
        (lambda: prnn.Mamba2(4, 2, 3, -1, key=KEY), "`state_size` must be at least 1; got -1"),
        (lambda: prnn.Mamba2(4, 2, conv_width=-1, key=KEY), "`conv_width` must be at least 1"),
        (lambda: prnn.Based(4, 2, value_size=0, key=KEY), "`value_size` must be at least 1"),
        (lambda: prnn.MLSTM(4, 2, 3, 5, 0, key=KEY), "`output_size` must be at least 1"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
