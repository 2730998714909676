"""The layer: calling, streaming, carried and learned states, training, serialising."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from systems import error, normal, scan

import pararnn as prnn

INPUTS, SIZE, LENGTH = 3, 4, 21
CELLS = {"Elman": prnn.Elman, "GRU": prnn.GRU, "DiagonalGRU": prnn.DiagonalGRU}
SOLVERS = {
    "default": None,
    "Newton": prnn.Newton(chunk_size=4),
    "Jacobi": prnn.Jacobi(chunk_size=8),
}
over_cells = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS.keys())
over_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def layer(make, solver=None, seed=0, **options):
    return prnn.RNN(make(INPUTS, SIZE, key=jax.random.key(seed)), solver=solver, **options)


def inputs(seed=0, length=LENGTH):
    return normal(seed, (length, INPUTS))


@eqx.filter_jit
def by_scan(cell, xs, init):
    """All outputs by the definition of a cell."""
    us = cell.project(xs)
    return cell.readout(scan(cell.step, us, init), us)


@over_cells
@over_solvers
def test_call_and_stream(make, solver):
    """One call over the sequence, calls over its thirds, and one step at a time agree."""
    rnn = layer(make, solver)
    xs = inputs()
    call = eqx.filter_jit(rnn)
    ys, final = call(xs)
    assert ys.shape == (LENGTH, SIZE) and ys.dtype == np.float64
    assert error(ys, by_scan(rnn.cell, xs, rnn.init_state())) <= 1e-10

    parts, state = [], rnn.init_state()
    for first in (0, 7, 14):
        part, state = call(xs[first : first + 7], state)
        parts.append(part)
    assert error(jnp.concatenate(parts), ys) <= 1e-10
    assert error(state, final) <= 1e-10

    step = eqx.filter_jit(rnn.step)
    y, state = step(None, xs[0])
    streamed = [y]
    for x in xs[1:]:
        y, state = step(state, x)
        streamed.append(y)
    assert error(jnp.stack(streamed), ys) <= 1e-10
    assert error(state, final) <= 1e-10
    solution = eqx.filter_jit(rnn.solve)(xs, throw=False)
    assert error(solution.final, final) <= 1e-10
    assert solution.result == prnn.RESULTS.successful


@over_cells
def test_reset(make):
    """Pieces start from the layer's initial state, whatever state it was called with."""
    rnn = layer(make, prnn.Newton(chunk_size=4), learn_init=True)
    rnn = eqx.tree_at(lambda r: r.learned_state, rnn, normal(5, (SIZE,)))
    xs, carried = inputs(), normal(6, (SIZE,))
    reset = jnp.zeros(LENGTH, bool).at[jnp.asarray([5, 13])].set(True)
    call = eqx.filter_jit(rnn)
    ys, final = call(xs, carried, reset=reset)
    expected = [
        by_scan(rnn.cell, xs[:5], carried),
        by_scan(rnn.cell, xs[5:13], rnn.learned_state),
        by_scan(rnn.cell, xs[13:], rnn.learned_state),
    ]
    assert error(ys, jnp.concatenate(expected)) <= 1e-10
    assert error(final, call(xs[13:])[1]) <= 1e-10


@over_cells
def test_learned_initial_state(make):
    plain, learned = layer(make), layer(make, learn_init=True)
    assert plain.learned_state is None
    assert error(learned.learned_state, plain.cell.init_state()) == 0
    xs = inputs()

    @eqx.filter_jit
    def gradients(learned):
        ours = eqx.filter_grad(lambda rnn: jnp.sum(jnp.sin(rnn(xs)[0])))(learned)
        other = eqx.filter_grad(lambda rnn: jnp.sum(rnn(xs, jnp.ones(SIZE))[0]))(learned)
        scanned = jax.grad(lambda h: jnp.sum(jnp.sin(by_scan(learned.cell, xs, h))))
        return ours, other, scanned(learned.learned_state)

    gradient, other, expected = gradients(learned)
    assert error(gradient.learned_state, expected) <= 1e-8
    # A state that is passed takes its place, and there is nothing left to learn.
    assert np.all(other.learned_state == 0)
    assert len(jtu.tree_leaves(learned)) == len(jtu.tree_leaves(plain)) + 1


@over_cells
@over_solvers
def test_gradient_of_the_weights(make, solver):
    """Per sequence and for a batch, against differentiating the scan of the cell."""
    rnn, batch = layer(make, solver), jnp.stack([inputs(1), inputs(2)])

    def loss(run, cell, batch):
        return jnp.mean(jnp.sin(3 * jax.vmap(lambda xs: run(cell, xs))(batch)))

    def solved(cell, xs):
        return prnn.RNN(cell, solver=solver)(xs)[0]

    def scanned(cell, xs):
        return by_scan(cell, xs, cell.init_state())

    got, expected = (
        eqx.filter_jit(eqx.filter_grad(lambda cell, run=run: loss(run, cell, batch)))(rnn.cell)
        for run in (solved, scanned)
    )
    leaves = eqx.filter(got, eqx.is_array), eqx.filter(expected, eqx.is_array)
    assert error(*(jtu.tree_leaves(tree) for tree in leaves)) <= 1e-8


def test_training_lowers_the_loss():
    """A few steps of Adam on a batch, with a layer inside a larger module."""

    class Model(eqx.Module):
        rnn: prnn.RNN
        head: eqx.nn.Linear

        def __call__(self, xs):
            ys, _ = self.rnn(xs)
            return jax.vmap(self.head)(ys)

    model = Model(
        layer(prnn.GRU, prnn.Newton(chunk_size=5), learn_init=True),
        eqx.nn.Linear(SIZE, 1, key=jax.random.key(1)),
    )
    batch = jnp.stack([inputs(seed) for seed in range(4)])
    targets = jnp.cumsum(batch[..., :1], axis=1) / 3
    optimiser = optax.adam(0.02)

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean((eqx.filter_vmap(model)(batch) - targets) ** 2)

    @eqx.filter_jit
    def update(model, state):
        value, gradient = loss(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    before, _ = eqx.filter_jit(loss)(model)
    values = []
    for _ in range(15):
        model, state, value = update(model, state)
        values.append(float(value))
    assert values[0] == pytest.approx(float(before))
    assert values[-1] < 0.8 * values[0]


@over_cells
def test_vmap_over_layers(make):
    """An ensemble: a batch of layers on a batch of sequences."""
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = eqx.filter_vmap(
        lambda key: prnn.RNN(make(INPUTS, SIZE, key=key), solver=prnn.Newton(chunk_size=6))
    )(keys)
    batch = jnp.stack([inputs(seed) for seed in range(3)])
    ys, final = eqx.filter_jit(eqx.filter_vmap(lambda rnn, xs: rnn(xs)))(ensemble, batch)
    assert ys.shape == (3, LENGTH, SIZE) and final.shape == (3, SIZE)
    for i, key in enumerate(keys):
        cell = make(INPUTS, SIZE, key=key)
        assert error(ys[i], by_scan(cell, batch[i], cell.init_state())) <= 1e-10


@over_cells
def test_serialising(make, tmp_path):
    solver = prnn.Newton(chunk_size=4)
    saved = layer(make, solver, learn_init=True)
    saved = jtu.tree_map(lambda x: x + 0.1 if eqx.is_inexact_array(x) else x, saved)
    eqx.tree_serialise_leaves(tmp_path / "layer.eqx", saved)
    loaded = eqx.tree_deserialise_leaves(
        tmp_path / "layer.eqx", layer(make, solver, seed=1, learn_init=True)
    )
    assert eqx.tree_equal(loaded, saved)
    np.testing.assert_array_equal(loaded(inputs())[0], saved(inputs())[0])


@over_cells
def test_half_precision_parameters(make):
    """The state has at least float32."""
    cell = make(INPUTS, SIZE, dtype=jnp.bfloat16, key=jax.random.key(0))
    assert {leaf.dtype for leaf in jtu.tree_leaves(cell)} == {jnp.dtype(jnp.bfloat16)}
    assert cell.init_state().dtype == np.float32


@over_cells
def test_empty_sequence(make):
    rnn = layer(make)
    ys, final = rnn(jnp.zeros((0, INPUTS)))
    assert ys.shape == (0, SIZE)
    assert error(final, rnn.init_state()) == 0


def test_failure_is_raised_or_returned():
    rnn = prnn.RNN(
        eqx.tree_at(lambda c: c.bias, layer(prnn.Elman).cell, jnp.full(SIZE, jnp.nan)),
        solver=prnn.Newton(chunk_size=3),
    )
    with pytest.raises(eqx.EquinoxRuntimeError, match="A state is not finite"):
        jax.block_until_ready(rnn(inputs()))
    assert rnn.solve(inputs(), throw=False).result == prnn.RESULTS.nonfinite


# --- without raising ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, prnn.Newton(chunk_size=4)], ids=["default", "Newton"])
def test_export(solver):
    """A program that cannot raise is complete in itself."""
    rnn, xs = layer(prnn.DiagonalGRU, solver), inputs()
    expected = by_scan(rnn.cell, xs, rnn.init_state())
    exported = jax.export.export(jax.jit(lambda xs: rnn(xs, throw=False)[0]))(xs)
    assert error(exported.call(xs), expected) <= 1e-10
    both = prnn.Bidirectional(rnn, rnn)
    exported = jax.export.export(jax.jit(lambda xs: both(xs, throw=False)[0]))(xs)
    assert error(exported.call(xs)[:, :SIZE], expected) <= 1e-10


def test_failures_pass_without_raising():
    rnn = prnn.RNN(
        eqx.tree_at(lambda c: c.bias, layer(prnn.Elman).cell, jnp.full(SIZE, jnp.nan)),
        solver=prnn.Newton(chunk_size=3),
    )
    ys, final = rnn(inputs(), throw=False)
    assert np.all(np.isnan(ys)) and np.all(np.isnan(final))


# --- initial states -------------------------------------------------------------------------------


def m2rnn(inputs, size, *, key):
    return prnn.M2RNN(inputs, 1, 2, 2, size, conv_width=3, key=key)


@pytest.mark.parametrize("learn_init", [False, True])
@pytest.mark.parametrize("make", [prnn.GRU, prnn.LSTM, m2rnn])
def test_initial_states_are_accepted(make, learn_init):
    """Like no state at all: by the call, by the step, in a scan over steps, with and without an
    example of the inputs."""
    rnn, xs = layer(make, learn_init=learn_init), inputs(length=7)
    rnn = jtu.tree_map(lambda x: x + 0.1 if eqx.is_inexact_array(x) else x, rnn)
    call, make_step = eqx.filter_jit(rnn), eqx.filter_jit(rnn.step)
    ys, final = call(xs)
    x = jax.ShapeDtypeStruct((INPUTS,), xs.dtype)
    for state in (rnn.init_state(), rnn.init_state(xs[0]), rnn.init_state(x)):
        got, last = call(xs, state)
        assert error(got, ys) == 0 and error(last, final) == 0
        y, after = make_step(state, xs[0])
        again, last = call(xs[1:], after)
        assert error(jnp.concatenate([y[None], again]), ys) <= 1e-10
        assert error(last, final) <= 1e-10
    for state in (rnn.init_state(), rnn.init_state(x)):
        assert jtu.tree_structure(state) == jtu.tree_structure(final)

    def body(state, x):
        y, state = rnn.step(state, x)
        return state, y

    last, streamed = jax.lax.scan(body, rnn.init_state(), xs)
    assert error(streamed, ys) <= 1e-10 and error(last, final) <= 1e-10


def test_past_inputs_take_the_dtype_of_inputs():
    """Those of `init_state()` have that of the parameters."""
    rnn = prnn.RNN(prnn.SelectiveSSM(INPUTS, 2, dtype=jnp.float32, key=jax.random.key(0)))
    xs = inputs(length=5).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        expected = rnn(xs, throw=False)
        assert error(rnn(xs, rnn.init_state(), throw=False), expected) == 0
    assert expected[1][1].dtype == jnp.bfloat16


@pytest.mark.usefixtures("as_users_run_it")
def test_states_of_other_layers_are_refused():
    key, xs = jax.random.key(0), jnp.ones((3, 4))
    rnn = prnn.RNN(prnn.RGLRU(4, key=key))
    message = "recurrence's state and whether there has been an input, or `init_state.*got.*, 1"
    with pytest.raises(ValueError, match=message):
        rnn(xs, (jnp.zeros(4), 1))
    with pytest.raises(ValueError, match="recurrence's state and the last 3 inputs, or `init"):
        prnn.RNN(prnn.SelectiveSSM(4, 2, key=key))(xs, rnn.init_state())


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("make", [prnn.GRU, prnn.LSTM, m2rnn])
def test_swapped_arguments_of_a_step(make):
    rnn, x = layer(make), inputs()[0]
    states = [rnn.step(None, x)[1], rnn.init_state(), None]
    for state in states:
        with pytest.raises(ValueError, match=r"`step` takes the state before the input, `rnn.step"):
            rnn.step(x, state)


# --- cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_cells_of_equinox_are_accepted(make):
    cell, xs = make(INPUTS, SIZE, key=jax.random.key(0)), inputs()
    rnn = prnn.RNN(cell)
    assert eqx.tree_equal(rnn.cell, prnn.from_equinox(cell)) and rnn.cell.cell is cell
    assert error(rnn(xs)[0], prnn.RNN(prnn.from_equinox(cell))(xs)[0]) == 0


def test_layers_are_generic_in_their_cell():
    class Model(eqx.Module):
        rnn: prnn.RNN[prnn.GRU]

    model = Model(layer(prnn.GRU))
    assert model.rnn.cell.hidden_size == SIZE and isinstance(model.rnn, prnn.RNN)
    leaves, treedef = jtu.tree_flatten(model)
    assert eqx.tree_equal(jtu.tree_unflatten(treedef, leaves), model)
    assert prnn.RNN[prnn.GRU](model.rnn.cell).cell is model.rnn.cell
