"""Blocks, stacks of them, and layers in both directions."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from systems import error, normal

import pararnn as prnn

WIDTH, LENGTH = 4, 9


def para(key, **options):
    key_cell, key = jax.random.split(key)
    cell = prnn.DiagonalGRU(WIDTH, WIDTH, dtype=options.get("dtype"), key=key_cell)
    return prnn.ResidualBlock(WIDTH, prnn.RNN(cell), key=key, **options)


def matrix(key, **options):
    key_cell, key = jax.random.split(key)
    dtype = options.get("dtype")
    cell = prnn.M2RNN(WIDTH, 1, 2, 2, conv_width=3, dtype=dtype, key=key_cell)
    return prnn.ResidualBlock(WIDTH, prnn.RNN(cell), key=key, mlp_size=0, **options)


def minmax(key, **options):
    return prnn.minmax_block(WIDTH, 3, mlp_size=5, key=key, **options)


def mamba(key, **options):
    return prnn.mamba_block(WIDTH, state_size=2, key=key, **options)


def mlstm(key, **options):
    return prnn.mlstm_block(WIDTH, num_heads=2, conv_width=3, key=key, **options)


def slstm(key, **options):
    # A norm that takes the mean from heads of two features leaves but the sign.
    return prnn.slstm_block(WIDTH, num_heads=1, conv_width=3, key=key, **options)


def deltanet(key, **options):
    return prnn.gated_deltanet_block(WIDTH, num_heads=2, conv_width=3, key=key, **options)


def stack(key, **options):
    keys = jax.random.split(key)
    return prnn.Stack([para(keys[0], **options), minmax(keys[1], **options)])


PAPERS = {"Mamba": mamba, "mLSTM": mlstm, "sLSTM": slstm, "gated DeltaNet": deltanet}
BLOCKS = {"ParaRNN": para, "M2RNN": matrix, "MinMax": minmax, "Stack": stack, **PAPERS}
over_blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())


@functools.cache
def block(make, **options):
    return make(jax.random.key(0), **options)


def inputs(seed=0):
    return normal(seed, (LENGTH, WIDTH))


# --- values -----------------------------------------------------------------------------------


def rms(norm, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.eps) * np.asarray(norm.weight)


def linear(layer, x):
    return x @ np.asarray(layer.weight).T


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_values_of_the_residual_block():
    made, xs = block(para), np.asarray(inputs())
    h, cell, ys = np.zeros(WIDTH), made.rnn.cell, []
    us = [np.asarray(u) for u in cell.project(jnp.asarray(rms(made.norm, xs)))]
    for t in range(LENGTH):
        h = np.asarray(cell.step(jnp.asarray(h), [jnp.asarray(u[t]) for u in us]))
        ys.append(h)
    a = xs + np.stack(ys)
    n = rms(made.mlp_norm, a)
    gate = linear(made.mlp.gate, n)
    expected = a + linear(made.mlp.down, gate * sigmoid(gate) * linear(made.mlp.up, n))
    got, final = eqx.filter_jit(made)(jnp.asarray(xs))
    assert error(got, jnp.asarray(expected)) <= 1e-10
    assert error(final, jnp.asarray(h)) <= 1e-10


def test_values_of_the_minmax_block():
    made, xs = block(minmax), np.asarray(inputs())
    cell = made.rnn.cell
    n = rms(cell.conv_norm, xs)
    past = np.concatenate([np.zeros((1, WIDTH)), n[:-1]])
    a = xs + linear(cell.conv_present, n) + linear(cell.conv_past, past)
    m = rms(cell.mlp_norm, a)
    gate = np.maximum(linear(cell.mlp.gate, m), 0)
    b = rms(cell.neuron_norm, a + linear(cell.mlp.down, gate * linear(cell.mlp.up, m)))
    neuron = jtu.tree_map(np.asarray, cell.neuron)
    r = b @ neuron.weight_r.T + neuron.bias_r
    s = b @ neuron.weight_s.T + neuron.bias_s
    h, states = np.zeros(3), []
    for t in range(LENGTH):
        h = np.maximum(np.minimum(r[t], h), s[t])
        states.append(h)
    ys = (np.stack(states) * sigmoid(b @ neuron.weight_g.T)) @ neuron.weight_o.T
    got, _ = eqx.filter_jit(made)(jnp.asarray(xs))
    assert error(got, jnp.asarray(xs + ys)) <= 1e-10


def test_values_of_the_gated_block():
    made, xs = block(mamba), np.asarray(inputs())
    cell, n = made.rnn.cell, rms(made.norm, xs)
    us = cell.project(jnp.asarray(linear(made.inputs, n)))
    states, h = [], cell.init_state()
    for t in range(LENGTH):
        h = cell.step(h, jtu.tree_map(lambda u, t=t: u[t], us))
        states.append(h)
    ys = np.asarray(cell.readout(jnp.stack(states), us))
    gate = linear(made.gate, n)
    expected = xs + linear(made.output, ys * gate * sigmoid(gate))
    got, _ = eqx.filter_jit(made)(jnp.asarray(xs))
    assert error(got, jnp.asarray(expected)) <= 1e-10


@over_blocks
def test_streaming_and_carrying(make):
    """One call, two calls, and one step at a time agree."""
    made, xs = block(make), inputs()
    ys, final = eqx.filter_jit(made)(xs)
    first, state = eqx.filter_jit(made)(xs[:4])
    step, streamed = eqx.filter_jit(made.step), []
    for x in xs[4:]:
        y, state = step(state, x)
        streamed.append(y)
    assert error(jnp.concatenate([first, jnp.stack(streamed)]), ys) <= 1e-10
    assert error(state, final) <= 1e-10
    y, _ = step(None, xs[0])
    assert error(y, ys[0]) <= 1e-10


def test_a_stack_of_any_layers():
    """Layers of any width, one after another; what each sees is the output of the one before."""
    keys = jax.random.split(jax.random.key(0), 3)
    narrow = prnn.RNN(prnn.Elman(WIDTH, 3, key=keys[0]))
    wide = prnn.RNN(prnn.SelectiveSSM(3, 2, key=keys[1]))
    both = prnn.Bidirectional(narrow, prnn.RNN(prnn.GRU(WIDTH, 2, key=keys[2])))
    xs = inputs()
    ys, final = prnn.Stack([narrow, wide])(xs)
    expected, state = narrow(xs)
    expected, second = wide(expected)
    assert error(ys, expected) == 0 and error(final, (state, second)) == 0
    state = prnn.Stack([narrow, wide]).init_state(xs[0])
    assert jtu.tree_structure(state) == jtu.tree_structure(final)
    ys, _ = prnn.Stack([both, prnn.RNN(prnn.Elman(5, 1, key=keys[1]))])(xs)
    assert ys.shape == (LENGTH, 1)


# --- pieces and padding -----------------------------------------------------------------------


def gradient(loss, made, xs):
    def total(arguments):
        ys = loss(*arguments)
        return jnp.sum(jnp.sin(3 * ys)), ys

    (_, ys), grads = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))((made, xs))
    return ys, jtu.tree_leaves(eqx.filter(grads, eqx.is_array))


MASK = np.asarray([1, 1, 1, 0, 1, 1, 1, 0, 0], bool)
IDS = np.asarray([0, 0, 0, 0, 1, 1, 1, 2, 2])


@pytest.mark.parametrize(
    "make", [stack, matrix, *PAPERS.values()], ids=["Stack", "M2RNN", *PAPERS.keys()]
)
def test_pieces_and_padding(make):
    made, xs = block(make), inputs()
    garbage = jnp.where(MASK[:, None], xs, jnp.nan)

    def separate(made, xs):
        pieces = [made(xs[first : first + 3])[0] for first in (0, 4)]
        return jnp.zeros_like(xs).at[jnp.asarray([0, 1, 2, 4, 5, 6])].set(jnp.concatenate(pieces))

    def packed(made, xs):
        return made(xs, reset=prnn.segment_starts(IDS), mask=MASK)[0]

    ys, grads = gradient(packed, made, garbage)
    expected_ys, expected_grads = gradient(separate, made, xs)
    assert error(ys, expected_ys) <= 1e-10
    for got, expected in zip(grads, expected_grads, strict=True):
        assert error(got, expected) <= 1e-8


@functools.cache
def both_ways():
    keys = jax.random.split(jax.random.key(0))
    cells = (
        prnn.Elman(WIDTH, 3, key=keys[0]),
        prnn.M2RNN(WIDTH, 1, 2, 2, 5, conv_width=3, key=keys[1]),
    )
    return prnn.Bidirectional(*map(prnn.RNN, cells))


def test_bidirectional():
    """Against running the two cells by hand, piece by piece."""
    layer, xs = both_ways(), inputs()
    garbage = jnp.where(MASK[:, None], xs, jnp.nan)

    @eqx.filter_jit
    def expected(xs):
        forward, final = prnn.RNN(layer.forward.cell)(xs)
        backward, backward_final = prnn.RNN(layer.backward.cell)(xs[::-1])
        return jnp.concatenate([forward, backward[::-1]], -1), (final, backward_final)

    call = eqx.filter_jit(layer)
    ys, final = call(xs)
    assert ys.shape == (LENGTH, 3 + 5)
    assert error((ys, final), expected(xs)) <= 1e-10
    ys, (forward, backward) = call(garbage, reset=prnn.segment_starts(IDS), mask=MASK)
    (first, (_, first_back)), (second, (second_forward, _)) = expected(xs[:3]), expected(xs[4:7])
    assert error(ys[:3], first) <= 1e-10 and error(ys[4:7], second) <= 1e-10
    assert error(forward, second_forward) <= 1e-10 and error(backward, first_back) <= 1e-10
    assert np.all(ys[~MASK] == 0)


@over_blocks
def test_initial_states_and_export(make):
    """`init_state` is accepted like no state at all, also by a scan over steps; a call that raises
    nothing can be exported."""
    made, xs = block(make), inputs()[:5]
    call, step = eqx.filter_jit(made), eqx.filter_jit(made.step)
    ys, final = call(xs)
    for state in (made.init_state(), made.init_state(xs[0])):
        got, last = call(xs, state)
        # Of another program: a state that is an argument may be rounded in another order.
        assert error(got, ys) <= 1e-15 and error(last, final) <= 1e-15
        assert error(step(state, xs[0])[0], ys[0]) <= 1e-10

    def body(state, x):
        y, state = made.step(state, x)
        return state, y

    last, streamed = jax.lax.scan(body, made.init_state(), xs)
    assert error(streamed, ys) <= 1e-10 and error(last, final) <= 1e-10
    exported = jax.export.export(jax.jit(lambda xs: made(xs, throw=False)))(xs)
    assert error(exported.call(xs), (ys, final)) <= 1e-10


# --- training ---------------------------------------------------------------------------------


def bare(key, **options):
    """One branch only, which shows what dropout does to it."""
    cell = prnn.Elman(WIDTH, WIDTH, key=key)
    return prnn.ResidualBlock(WIDTH, prnn.RNN(cell), mlp_size=0, key=key, **options)


def test_dropout():
    made, xs = block(bare, dropout=0.5), inputs()
    for call in (made, lambda xs: made.step(None, xs[0]), prnn.Stack([made])):
        with pytest.raises(ValueError, match="`key` must be given.*0.5.*inference_mode"):
            call(xs)
    keys = jax.random.split(jax.random.key(1))
    run = eqx.filter_jit(lambda made, key: made(xs, key=key)[0])
    one, again, other = (run(made, key) for key in (keys[0], keys[0], keys[1]))
    assert np.all(one == again) and np.any(one != other)
    full = run(block(bare), None)
    assert error(run(eqx.nn.inference_mode(made), None), full) == 0
    # What is dropped is zero, what is kept is scaled.
    kept = np.asarray(one != xs)
    assert 0 < kept.sum() < kept.size
    assert np.allclose((one - xs)[kept], 2 * (full - xs)[kept])


def test_training_and_serialising(tmp_path):
    """Batches, keys for dropout, Adam; a file gives back what was saved."""
    made = block(stack, dropout=0.1)
    batch = jnp.stack([inputs(seed) for seed in range(3)])
    targets = jnp.cumsum(batch, axis=1) / 3
    optimiser = optax.adam(0.02)

    @eqx.filter_jit
    def update(made, state, key):
        def loss(made):
            keys = jax.random.split(key, 3)
            ys = eqx.filter_vmap(lambda xs, key: made(xs, key=key)[0])(batch, keys)
            return jnp.mean((ys - targets) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(made)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state)
        return eqx.apply_updates(made, updates), state, value

    state, values = optimiser.init(eqx.filter(made, eqx.is_inexact_array)), []
    for key in jax.random.split(jax.random.key(2), 15):
        made, state, value = update(made, state, key)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]

    eqx.tree_serialise_leaves(tmp_path / "stack.eqx", made)
    other = eqx.filter_eval_shape(lambda: stack(jax.random.key(9), dropout=0.1))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "stack.eqx", other)
    assert eqx.tree_equal(loaded, made)


# --- mixed precision --------------------------------------------------------------------------

CELLS = {
    "Elman": prnn.Elman,
    "GRU": prnn.GRU,
    "LSTM": prnn.LSTM,
    "DiagonalGRU": prnn.DiagonalGRU,
    "DiagonalLSTM": prnn.DiagonalLSTM,
    "SLSTM": prnn.SLSTM,
    "LRU": prnn.LRU,
    "MinMax": prnn.MinMax,
    "PiecewiseLinearRNN": prnn.PiecewiseLinearRNN,
    "M2RNN": lambda *sizes, key: prnn.M2RNN(WIDTH, 1, 2, 2, conv_width=2, key=key),
    "DeltaNet": lambda *sizes, key: prnn.DeltaNet(WIDTH, 1, 2, 2, key=key),
    "DeltaProduct": lambda *sizes, key: prnn.DeltaProduct(WIDTH, 1, 2, 2, key=key),
    "TTTLinear": lambda *sizes, key: prnn.TTTLinear(WIDTH, 1, 2, 2, key=key),
    "Aaren": lambda *sizes, key: prnn.Aaren(WIDTH, 1, 2, 2, key=key),
    "S5": prnn.S5,
    "S4D": prnn.S4D,
    "RGLRU": lambda *sizes, key: prnn.RGLRU(WIDTH, key=key),
    "MinGRU": prnn.MinGRU,
    "MinLSTM": prnn.MinLSTM,
    "SelectiveSSM": prnn.SelectiveSSM,
    "LinearLMU": lambda *sizes, key: prnn.LinearLMU(*sizes, 3, 5.0, key=key),
    "LMU": lambda *sizes, key: prnn.LMU(*sizes, 3, 5.0, key=key),
    "GatedLinearAttention": lambda *_, key: prnn.GatedLinearAttention(WIDTH, 1, 2, 2, key=key),
    # Of heads of two features, a norm that takes the mean from them leaves but the sign.
    "Retention": lambda *_, key: prnn.Retention(WIDTH, 1, 2, 4, key=key),
    "Mamba2": lambda *_, key: prnn.Mamba2(WIDTH, 1, 2, 2, conv_width=2, key=key),
    "Based": lambda *_, key: prnn.Based(WIDTH, 1, 2, 2, key=key),
    "MLSTM": lambda *_, key: prnn.MLSTM(WIDTH, 1, 2, 4, key=key),
    "EquinoxLSTM": lambda *sizes, key: prnn.from_equinox(eqx.nn.LSTMCell(*sizes, key=key)),
}
LAYERS = {
    **{
        name: lambda key, make=make: prnn.RNN(make(WIDTH, WIDTH, key=key))
        for name, make in CELLS.items()
    },
    "ParaRNN block": para,
    "MinMax block": minmax,
    **{f"{name} block": make for name, make in PAPERS.items()},
}


def cast(tree, dtype):
    return jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def relative_distance(got, expected):
    """Of all numbers together: single ones of bfloat16 may be far off."""
    got, expected = (
        np.concatenate([np.ravel(x).astype(complex) for x in jtu.tree_leaves(tree)])
        for tree in (got, expected)
    )
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    """Parameters and inputs in bfloat16, states in float32; gradients like the parameters."""
    low = cast(LAYERS[name](jax.random.key(0)), jnp.bfloat16)
    xs = inputs().astype(jnp.bfloat16)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def run(arguments):
        layer, xs = arguments
        ys, state = layer(xs, throw=False)
        return jnp.sum(jnp.sin(ys.astype(jnp.float32))), (ys, state)

    with jax.numpy_dtype_promotion("standard"):
        grads, (ys, state) = run((low, xs))
        expected_grads, (expected, _) = run((cast(low, jnp.float32), xs.astype(jnp.float32)))
    grads, expected_grads = (eqx.filter(g, eqx.is_array) for g in (grads, expected_grads))
    assert {x.dtype for x in jtu.tree_leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert ys.dtype == (jnp.bfloat16 if "block" in name else jnp.float32)
    # The other leaves of a state are past inputs, and whether there was any.
    dtypes = {x.dtype.name for x in jtu.tree_leaves(state)} - {"bfloat16", "bool"}
    assert dtypes == {"complex64" if name in ("LRU", "S5", "S4D") else "float32"}
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert relative_distance(ys, expected) <= 2 * eps
    assert relative_distance(grads, expected_grads) <= 4 * eps


# --- errors -----------------------------------------------------------------------------------


def test_errors(as_users_run_it):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="`state` must be a tuple of 2 states, one per layer; got"):
        block(stack)(inputs(), (jnp.zeros(WIDTH),))
    for make in (para, matrix, mamba, stack):
        state = block(make).init_state()
        with pytest.raises(
            ValueError, match=r"`step` takes the state before the input, `\w+.step\("
        ):
            block(make).step(inputs()[0], state if make is not para else None)
    for make in (para, minmax, stack):
        with pytest.raises(
            ValueError, match=r"`xs` must have shape \(L, width\).*\(2, 9, 4\).*vmap"
        ):
            block(make)(jnp.stack([inputs(), inputs()]))
        with pytest.raises(ValueError, match=r"`mask`.*got int64.*`mask.astype\(bool\)`"):
            block(make)(inputs(), mask=np.ones(LENGTH, int))
    with pytest.raises(ValueError, match=r"`state` must be what the call.*last 1 inputs"):
        block(minmax)(inputs(), (jnp.zeros(3), jnp.zeros((2, WIDTH))))
    narrow = prnn.ResidualBlock(WIDTH, prnn.RNN(prnn.Elman(WIDTH, 3, key=key)), key=key)
    with pytest.raises(ValueError, match=r"`rnn` must have.*\(9, 4\).*got \(9, 3\)"):
        narrow(inputs())
