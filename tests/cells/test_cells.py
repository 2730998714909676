"""Every cell against its formulas, transcribed to NumPy; and what solvers rely on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from delta_cells import numpy_aaren, numpy_delta_net, numpy_ttt
from image_cells import numpy_conv_lstm, numpy_conv_s5
from linear_cells import (
    numpy_linear_lmu,
    numpy_lmu,
    numpy_min_gru,
    numpy_min_lstm,
    numpy_plstm,
    numpy_rglru,
    numpy_s4d,
    numpy_s5,
    numpy_selective_ssm,
    sigmoid,
    silu,
    softplus,
)
from memory_cells import numpy_titans, numpy_titans_chunked
from outer_cells import numpy_based, numpy_gla, numpy_mamba2, numpy_mlstm, numpy_retention

import pararnn as prnn
from pararnn import cells
from pararnn._misc import make_ravel
from pararnn.cells._base import check_inputs, check_sizes

INPUTS, LENGTH = 4, 30
NEWTON = prnn.Newton(chunk_size=4, fallback=False)


def make(cls, *sizes, **options):
    """A cell with random parameters throughout: none is zero or the identity."""
    cell = eqx.filter_eval_shape(cls, *sizes, key=jax.random.key(0), **options)
    rng = np.random.default_rng(7)

    def fill(x):
        is_struct = isinstance(x, jax.ShapeDtypeStruct)
        return jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype) if is_struct else x

    return jtu.tree_map(fill, cell)


def input_shape(cell):
    return (cell.input_channels, *cell.image_shape) if hasattr(cell, "image_shape") else (INPUTS,)


def inputs(length=LENGTH, seed=0, dtype=None, cell=None):
    shape = (length, *input_shape(cell))
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@eqx.filter_jit
def run(cell, xs):
    us = cell.project(xs)
    step = lambda h, u: (cell.step(h, u),) * 2  # noqa: E731
    _, states = jax.lax.scan(step, cell.init_state(), us)
    return states, cell.readout(states, us)


# --- the formulas, step by step in NumPy; each returns the states and the outputs -------------


def heads_to_dense(weight, gates):
    """Dense matrices, one per gate: rows of `weight` over heads, then gates, then units."""
    k = weight.shape[1]
    num_heads = weight.shape[0] // (gates * k)
    dense = np.zeros((gates, num_heads * k, num_heads * k))
    for n in range(num_heads):
        for g in range(gates):
            at = (n * gates + g) * k
            dense[g, n * k : (n + 1) * k, n * k : (n + 1) * k] = weight[at : at + k]
    return dense


def input_maps(p, x):
    """`u = W x + b` per gate, from stacked dense matrices or from blocks per head."""
    if p.weight_x.ndim == 2:
        gates = p.weight_h.shape[0] // p.hidden_size
        return (p.weight_x @ x + p.bias).reshape(gates, -1)
    gates, num_heads, outputs, e = p.weight_x.shape
    u = np.empty((gates, num_heads * outputs))
    for g in range(gates):
        for n in range(num_heads):
            block = p.weight_x[g, n] @ x[n * e : (n + 1) * e]
            u[g, n * outputs : (n + 1) * outputs] = block
    return u + p.bias


def numpy_elman(p, xs):
    (W,) = heads_to_dense(p.weight_h, 1)
    h = np.zeros(p.hidden_size)
    for x in xs:
        h = (1 - p.leak) * h + p.leak * np.tanh(W @ h + p.weight_x @ x + p.bias)
        yield h, h


def numpy_gru(p, xs):
    W_r, W_z, W_n = heads_to_dense(p.weight_h, 3)
    h = np.zeros(p.hidden_size)
    for x in xs:
        u_r, u_z, u_n = input_maps(p, x)
        r, z = sigmoid(u_r + W_r @ h), sigmoid(u_z + W_z @ h)
        n = np.tanh(u_n + r * (W_n @ h + p.bias_n))
        h = (1 - z) * n + z * h
        yield h, h


def numpy_diagonal_gru(p, xs):
    a_z, a_r, a_c = p.weight_h
    h = np.zeros(p.hidden_size)
    for x in xs:
        u_z, u_r, u_c = input_maps(p, x)
        z, r = sigmoid(a_z * h + u_z), sigmoid(a_r * h + u_r)
        h = (1 - z) * h + z * np.tanh(a_c * h * r + u_c)
        yield h, h


def numpy_lstm(p, xs):
    W_i, W_f, W_g, W_o = heads_to_dense(p.weight_h, 4)
    c = h = np.zeros(p.hidden_size)
    for x in xs:
        u_i, u_f, u_g, u_o = input_maps(p, x)
        i, f, o = sigmoid(u_i + W_i @ h), sigmoid(u_f + W_f @ h), sigmoid(u_o + W_o @ h)
        c = f * c + i * np.tanh(u_g + W_g @ h)
        h = o * np.tanh(c)
        yield (c, h), h


def numpy_diagonal_lstm(p, xs):
    (a_f, a_c, a_o), (p_f, p_o) = p.weight_h, p.peephole
    c = h = np.zeros(p.hidden_size)
    for x in xs:
        u_f, u_c, u_o = input_maps(p, x)
        f = sigmoid(a_f * h + p_f * c + u_f)
        c = f * c + (1 - f) * np.tanh(a_c * h + u_c)
        h = sigmoid(a_o * h + p_o * c + u_o) * np.tanh(c)
        yield (c, h), h


def numpy_slstm(p, xs):
    """The stabilised form of the paper, with the first step's maximum over one argument."""
    R_i, R_f, R_z, R_o = heads_to_dense(p.weight_h, 4)
    h = c = n = np.zeros(p.hidden_size)
    m = np.full(p.hidden_size, -np.inf)
    for x in xs:
        u_i, u_f, u_z, u_o = input_maps(p, x)
        i_raw = u_i + R_i @ h
        a = m - np.logaddexp(0, -(u_f + R_f @ h))
        m = np.maximum(i_raw, a)
        i, f = np.exp(i_raw - m), np.exp(a - m)
        c, n = f * c + i * np.tanh(u_z + R_z @ h), np.maximum(f * n + i, 1)
        h = sigmoid(u_o + R_o @ h) * c / n
        yield (np.log(n) + m, c / n, h), h


def numpy_min_max(p, xs):
    h = np.zeros(p.hidden_size)
    for x in xs:
        r, s = p.weight_r @ x + p.bias_r, p.weight_s @ x + p.bias_s
        h = np.maximum(np.minimum(r, h), s)
        yield h, p.weight_o @ (h * sigmoid(p.weight_g @ x))


def numpy_m2rnn(p, xs):
    N, K, V = p.num_heads, p.key_size, p.value_size
    H = np.zeros((N, K, V))
    maps = np.concatenate([xs @ p.weight_q.T, xs @ p.weight_k.T, xs @ p.weight_v.T], axis=1)
    for t, x in enumerate(xs):
        qkv = maps[t]
        if p.conv_width:
            seen = range(max(0, t - p.conv_width + 1), t + 1)
            qkv = silu(sum(p.weight_conv[p.conv_width - 1 - t + j] * maps[j] for j in seen))
        q, k, v = qkv[:K], qkv[K : 2 * K], qkv[2 * K :].reshape(N, V)
        f = np.exp(-np.exp(p.a_log) * softplus(p.weight_f @ x + p.bias_f))
        Z = [np.tanh(H[n] @ p.weight_h[n] + np.outer(k, v[n])) for n in range(N)]
        H = np.stack([f[n] * H[n] + (1 - f[n]) * Z[n] for n in range(N)])
        y = np.concatenate([q @ H[n] + p.skip[n] * v[n] for n in range(N)])
        y = y * silu(p.weight_g @ x)
        y = y / np.sqrt(np.mean(y**2) + p.norm.eps) * p.norm.weight
        yield H, p.weight_o @ y


def numpy_plrnn(p, xs):
    W = p.weight_h - np.diag(np.diag(p.weight_h))
    h = np.zeros(p.hidden_size)
    for x in xs:
        h = p.decay * h + W @ np.maximum(h, 0) + p.weight_x @ x + p.bias
        yield h, h


def numpy_lru(p, xs):
    B, C = (w[0] + 1j * w[1] for w in (p.weight_x, p.weight_o))
    eigenvalues = np.exp(-np.exp(p.nu) + 1j * np.exp(p.theta))
    h = np.zeros(p.hidden_size, complex)
    for x in xs:
        h = eigenvalues * h + np.exp(p.gamma_log) * (B @ x)
        yield h, (C @ h).real + p.skip @ x


def heads(num_leaves, size, num_heads):
    """The groups of a state of `num_leaves` vectors of `size` elements, divided over heads."""
    index = np.arange(num_leaves * size).reshape(num_leaves, num_heads, -1)
    return {tuple(sorted(index[:, n].ravel().tolist())) for n in range(num_heads)}


def rows(shape, axis):
    """Groups along one axis of a state of that shape."""
    index = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), axis, -1)
    return {tuple(g) for g in index.reshape(-1, shape[axis]).tolist()}


def pairs(shape):
    """Channels of a head's first half, each with that of the second."""
    heads, size, values = shape
    index = np.arange(np.prod(shape)).reshape(heads, 2, size // 2, values)
    return {tuple(g) for g in np.moveaxis(index, 1, -1).reshape(-1, 2).tolist()}


def memories(num_heads, size):
    """The memories of heads, each with the number that follows them all."""
    index = np.arange(num_heads * size).reshape(num_heads, size)
    return {(*row, num_heads * size + n) for n, row in enumerate(index.tolist())}


# name: the cell, its transcription, the structure of its Jacobian (groups if block-diagonal)
CASES = {
    "Elman": (make(cells.Elman, 4, 6), numpy_elman, prnn.Dense),
    "Elman-heads": (make(cells.Elman, 4, 6, num_heads=3, leak=0.4), numpy_elman, heads(1, 6, 3)),
    "GRU": (make(cells.GRU, 4, 6), numpy_gru, prnn.Dense),
    "GRU-heads": (make(cells.GRU, 4, 6, num_heads=2), numpy_gru, heads(1, 6, 2)),
    "DiagonalGRU": (make(cells.DiagonalGRU, 4, 6, num_heads=2), numpy_diagonal_gru, prnn.Diagonal),
    "LSTM": (make(cells.LSTM, 4, 6), numpy_lstm, prnn.Dense),
    "LSTM-heads": (make(cells.LSTM, 4, 6, num_heads=3), numpy_lstm, heads(2, 6, 3)),
    "DiagonalLSTM": (make(cells.DiagonalLSTM, 4, 6), numpy_diagonal_lstm, heads(2, 6, 6)),
    "SLSTM": (make(cells.SLSTM, 4, 6), numpy_slstm, prnn.Dense),
    "SLSTM-heads": (make(cells.SLSTM, 4, 6, num_heads=3), numpy_slstm, heads(3, 6, 3)),
    "MinMax": (make(cells.MinMax, 4, 6, 5), numpy_min_max, prnn.Diagonal),
    "M2RNN": (make(cells.M2RNN, 4, 2, 3, 5, 6), numpy_m2rnn, rows((2, 3, 5), 2)),
    "M2RNN-bare": (make(cells.M2RNN, 4, 2, 3, 2, conv_width=0), numpy_m2rnn, rows((2, 3, 2), 2)),
    "PiecewiseLinearRNN": (make(cells.PiecewiseLinearRNN, 4, 6), numpy_plrnn, prnn.Dense),
    "LRU": (make(cells.LRU, 4, 6, 5), numpy_lru, heads(2, 6, 6)),
    "DeltaNet": (make(cells.DeltaNet, 4, 2, 3, 5, 6), numpy_delta_net, rows((2, 3, 5), 1)),
    "DeltaNet-bare": (
        make(cells.DeltaNet, 4, 2, 3, 2, gated=False, negative_eigenvalues=True),
        numpy_delta_net,
        rows((2, 3, 2), 1),
    ),
    "DeltaProduct": (make(cells.DeltaProduct, 4, 2, 3, 5, 6), numpy_delta_net, rows((2, 3, 5), 1)),
    "DeltaProduct-bare": (
        make(
            cells.DeltaProduct, 4, 2, 3, 2, num_factors=3, gated=False, negative_eigenvalues=False
        ),
        numpy_delta_net,
        rows((2, 3, 2), 1),
    ),
    "TTTLinear": (make(cells.TTTLinear, 4, 2, 3, 5, max_rate=1.5), numpy_ttt, rows((2, 3, 5), 1)),
    "Aaren": (make(cells.Aaren, 4, 2, 3, 2, 6), numpy_aaren, {(0, 2, 4, 5), (1, 3, 6, 7)}),
    "S5": (make(cells.S5, 4, 6), numpy_s5, heads(2, 6, 6)),
    "S5-outputs": (make(cells.S5, 4, 6, 5), numpy_s5, heads(2, 6, 6)),
    "S4D": (make(cells.S4D, 4, 3), numpy_s4d, heads(2, 12, 12)),
    "RGLRU": (make(cells.RGLRU, 4, num_heads=2), numpy_rglru, prnn.Diagonal),
    "RGLRU-bare": (make(cells.RGLRU, 4, normalise_first=True), numpy_rglru, prnn.Diagonal),
    "MinGRU": (make(cells.MinGRU, 4, 6), numpy_min_gru, prnn.Diagonal),
    "MinLSTM": (make(cells.MinLSTM, 4, 6), numpy_min_lstm, prnn.Diagonal),
    "SelectiveSSM": (make(cells.SelectiveSSM, 4, 3, dt_rank=2), numpy_selective_ssm, prnn.Diagonal),
    "SelectiveSSM-bare": (
        make(cells.SelectiveSSM, 4, 3, conv_width=0),
        numpy_selective_ssm,
        prnn.Diagonal,
    ),
    "LinearLMU": (
        make(cells.LinearLMU, 4, 6, 5, 7.5, memory_size=2),
        numpy_linear_lmu,
        heads(1, 10, 2),
    ),
    "LMU": (make(cells.LMU, 4, 6, 5, 7.5), numpy_lmu, prnn.Dense),
    "PLSTM": (make(cells.PLSTM, 4, 2, 3, 5, 6), numpy_plstm, prnn.Diagonal),
    "Titans": (make(cells.Titans, 4, 2, 2, 3, 5), numpy_titans, prnn.Dense),
    "TitansChunked": (
        make(cells.TitansChunked, 4, 2, 2, 3, 5, chunk_length=4),
        numpy_titans_chunked,
        prnn.Dense,
    ),
    "ConvLSTM": (make(cells.ConvLSTM, 2, 2, (3, 4)), numpy_conv_lstm, prnn.Dense),
    "ConvLSTM-pixels": (make(cells.ConvLSTM, 2, 2, (2, 3), 1), numpy_conv_lstm, heads(4, 6, 6)),
    "ConvS5": (make(cells.ConvS5, 2, 2, (3, 4), 3), numpy_conv_s5, heads(2, 24, 24)),
    "ConvS5-even": (
        make(cells.ConvS5, 2, 2, (3, 2), kernel_size=2),
        numpy_conv_s5,
        heads(2, 12, 12),
    ),
    "GatedLinearAttention": (
        make(cells.GatedLinearAttention, 4, 2, 3, 5, 6, gate_rank=2),
        numpy_gla,
        prnn.Diagonal,
    ),
    "Retention": (make(cells.Retention, 4, 2, 4, 3), numpy_retention, pairs((2, 4, 3))),
    "Mamba2": (make(cells.Mamba2, 4, 2, 3, 5, 6), numpy_mamba2, prnn.Diagonal),
    "Mamba2-bare": (make(cells.Mamba2, 4, 2, 3, 5, conv_width=0), numpy_mamba2, prnn.Diagonal),
    "Based": (make(cells.Based, 4, 2, 2, 3, 6), numpy_based, prnn.Diagonal),
    "MLSTM": (make(cells.MLSTM, 4, 2, 3, 2, 6), numpy_mlstm, memories(2, 9)),
}
CELLS = {name: case[0] for name, case in CASES.items()}
KEY = jax.random.key(0)
each_cell = pytest.mark.parametrize("name", CASES)


def close(got, expected, tol):
    jtu.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), got, expected)


@each_cell
def test_formulas(name):
    cell, xs = CELLS[name], inputs(cell=CELLS[name])
    numpy_cell = jtu.tree_map(lambda x: np.asarray(x) if eqx.is_array(x) else x, cell)
    expected = list(CASES[name][1](numpy_cell, np.asarray(xs)))
    expected = jtu.tree_map(lambda *leaves: np.stack(leaves), *expected)
    close(run(cell, xs), expected, 1e-12)


# --- what solvers rely on ---------------------------------------------------------------------


def some_state(cell, seed=3):
    rng = np.random.default_rng(seed)
    return jtu.tree_map(
        lambda h: jnp.asarray(0.5 * rng.standard_normal(h.shape), h.dtype), cell.init_state()
    )


def one_input(cell, t=5):
    us = eqx.filter_jit(cell.project)(inputs(t + 1, cell=cell))
    return jtu.tree_map(lambda u: u[t], us)


def jacobian(cell, state, u):
    ravel, unravel, _, _ = make_ravel(state)
    return jax.jit(jax.jacfwd(lambda v: ravel(cell.step(unravel(v), u))))(ravel(state))


@each_cell
def test_structure(name):
    cell, expected = CELLS[name], CASES[name][2]
    state, u = some_state(cell), one_input(cell)
    structure = prnn.detect_structure(cell.step, state, u)
    if isinstance(expected, set):
        assert isinstance(structure, prnn.BlockDiagonal)
        assert {tuple(sorted(g)) for g in structure.groups} == expected
    else:
        assert isinstance(structure, expected)
    matrix = jacobian(cell, state, u)
    seeds = structure.seeds(len(matrix), np.dtype(float))
    close(structure.to_dense(structure.compress(seeds @ matrix.T)), matrix, 1e-14)


def by_scan(step, us, init):
    return jax.lax.scan(lambda h, u: (step(h, u),) * 2, init, us)[1]


def by_newton(step, us, init):
    return prnn.solve(step, us, init, solver=NEWTON, adjoint=prnn.Newton(), throw=False).states


@eqx.filter_jit
def states_and_gradients(run, arguments):
    """Gradients with respect to parameters, inputs and the state before."""

    def loss(arguments):
        cell, xs, init = arguments
        us = cell.project(xs)
        states = run(cell.step, us, init)
        ys = cell.readout(states, us)
        return jnp.vdot(jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)), ys.ravel()), states

    (_, states), grads = eqx.filter_value_and_grad(loss, has_aux=True)(arguments)
    return states, grads


# Of each class, the member with the more particular structure.
ONE_PER_CLASS = {type(cell): name for name, cell in CELLS.items() if not name.endswith("-bare")}


@pytest.mark.parametrize("name", ONE_PER_CLASS.values())
def test_parallel_is_sequential(name):
    """Also with weights so large that some cells do not forget any more. The gradient is that of
    the plain scan; here by Newton's method, in `test_leaves.py` by what is chosen."""
    cell, xs = CELLS[name], inputs(23, seed=1, cell=CELLS[name])
    large = jtu.tree_map(lambda x: 4 * x if eqx.is_inexact_array(x) else x, cell)
    init = jtu.tree_map(lambda h: h + 0.1, cell.init_state())
    for weights in (cell, large):
        expected = states_and_gradients(by_scan, (weights, xs, init))
        got = states_and_gradients(by_newton, (weights, xs, init))
        for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
            if eqx.is_array(b):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * float(jnp.max(jnp.abs(b))))


def test_every_cell_is_here():
    concrete = {
        cell
        for cell in vars(cells).values()
        if isinstance(cell, type)
        and issubclass(cell, prnn.AbstractCell)
        and not cell.__name__.startswith(("Abstract", "Equinox"))
    }
    assert ONE_PER_CLASS.keys() == concrete


@each_cell
def test_projection_and_readout_are_local(name):
    """Projecting a window of inputs, or reading out one step, gives the numbers of the whole: so
    streaming agrees with the parallel call. Inputs before the first count as zeros; a cell to which
    the first step is unlike the others is told which one it is."""
    cell, xs = CELLS[name], inputs(8, cell=CELLS[name])
    contexts = {"M2RNN": 3, "SelectiveSSM": 3, "Mamba2": 3, "PLSTM": 1}
    assert cell.context == contexts.get(name, 0)
    project, readout = eqx.filter_jit(cell.project), eqx.filter_jit(cell.readout)
    us, (states, ys) = project(xs), run(cell, xs)
    padded = jnp.concatenate([jnp.zeros((cell.context, *xs.shape[1:])), xs])
    assert cell.sees_starts == (name == "RGLRU")
    if cell.sees_starts:
        with_starts = eqx.filter_jit(cell.project_with_starts)
        starts = jnp.arange(8) == 0
        close(us, with_starts(xs, starts), 0)
        project = lambda window: with_starts(window, starts[t : t + 1])  # noqa: E731
    for t in (0, 2, 6):
        now = lambda tree, t=t: jtu.tree_map(lambda x: x[t : t + 1], tree)  # noqa: E731
        u = jtu.tree_map(lambda u: u[-1:], project(padded[t : t + cell.context + 1]))
        close(u, now(us), 1e-14)
        close(readout(now(states), u), now(ys), 1e-13)
    empty = eqx.filter_eval_shape(cell.project, xs[:0])
    assert all(u.shape[0] == 0 for u in jtu.tree_leaves(empty))


# Those of `test_linear_cells.py` and, with convolutions, `test_blocks.py` are rolled out there.
ROLLED_OUT_ELSEWHERE = {
    *("DeltaNet", "DeltaProduct", "TTTLinear", "Aaren", "S5-outputs", "S4D", "RGLRU", "MinGRU"),
    *("MinLSTM", "SelectiveSSM", "LinearLMU", "LMU", "PLSTM", "GatedLinearAttention", "Retention"),
    *("Mamba2", "Based", "MLSTM"),
}


@pytest.mark.parametrize(
    "name", [name for name in ONE_PER_CLASS.values() if name not in ROLLED_OUT_ELSEWHERE]
)
def test_rollout(name):
    """A scan over steps, from the state that a layer says to begin with, is the call."""

    @eqx.filter_jit
    def both(rnn, xs):
        step = lambda state, x: rnn.step(state, x)[::-1]  # noqa: E731
        return rnn(xs, throw=False), jax.lax.scan(step, rnn.init_state(), xs)[::-1]

    close(
        *both(prnn.RNN(CELLS[name], solver=prnn.Sequential()), inputs(6, cell=CELLS[name])), 1e-12
    )


def cast(cell, dtype):
    return jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, cell)


def dtypes(cell, x_dtype):
    def shapes(xs):
        us = cell.project(xs)
        state = cell.init_state()
        states = jtu.tree_map(lambda h: jnp.broadcast_to(h, (5, *h.shape)), state)
        return state, jax.vmap(cell.step)(states, us), cell.readout(states, us)

    state, new, ys = eqx.filter_eval_shape(shapes, jnp.zeros((5, *input_shape(cell)), x_dtype))
    assert [h.dtype for h in jtu.tree_leaves(state)] == [h.dtype for h in jtu.tree_leaves(new)]
    return {h.dtype.name for h in jtu.tree_leaves(state)}, ys.dtype.name


@each_cell
def test_dtypes(name):
    complex_state = any(jnp.iscomplexobj(h) for h in jtu.tree_leaves(CELLS[name].init_state()))
    kind = "complex64" if complex_state else "float32"
    for dtype in (jnp.float32, jnp.bfloat16):
        cell = cast(CELLS[name], dtype)
        assert dtypes(cell, dtype) == ({kind}, "float32")
    with jax.numpy_dtype_promotion("standard"):
        assert dtypes(cell, jnp.float32) == ({kind}, "float32")


@pytest.mark.parametrize("name", ONE_PER_CLASS.values())
def test_half_precision(name):
    """Nothing is promoted silently where parameters and inputs are bfloat16 and states float32: in
    a layer, its derivative and its steps, whose state keeps its structure, shapes and dtypes."""
    rnn = prnn.RNN(cast(CELLS[name], jnp.bfloat16))
    xs = jnp.zeros((5, *input_shape(rnn.cell)), jnp.bfloat16)

    def loss(arguments):
        rnn, xs = arguments
        ys, final = rnn(xs, throw=False)
        return jnp.sum(ys), final

    gradient = eqx.filter_value_and_grad(loss, has_aux=True)
    (total, final), grads = eqx.filter_eval_shape(gradient, (rnn, xs))
    assert total.dtype == jnp.float32
    assert {g.dtype for g in jtu.tree_leaves(grads) if hasattr(g, "dtype")} == {xs.dtype}
    state = rnn.init_state()
    _, after = eqx.filter_eval_shape(lambda rnn, x, state: rnn.step(state, x), rnn, xs[0], state)
    structs = lambda tree: jax.eval_shape(lambda: tree)  # noqa: E731
    assert after == structs(state) == final


@eqx.filter_jit
def initial(dtype):
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
    sizes: dict[type, tuple] = {cells.M2RNN: (4, 3, 3, 5), cells.DeltaNet: (4, 3, 3, 5)}
    sizes |= {cells.RGLRU: (4,), cells.LinearLMU: (4, 6, 5, 7.5), cells.LMU: (4, 6, 5, 7.5)}
    sizes |= {cells.PLSTM: (4, 3, 3, 5)}
    sizes |= {cells.Titans: (4, 2, 2, 3), cells.TitansChunked: (4, 2, 2, 3)}
    sizes |= {cells.ConvLSTM: (2, 3, (3, 4)), cells.ConvS5: (2, 3, (3, 4))}
    sizes |= dict.fromkeys((cells.DeltaProduct, cells.TTTLinear, cells.Aaren), (4, 3, 3, 5))
    outer = cells.GatedLinearAttention, cells.Retention, cells.Mamba2, cells.Based, cells.MLSTM
    sizes |= {cell: (4, 2, 4, 3) for cell in outer}
    made = {type(cell): sizes.get(type(cell), (4, 6)) for cell in CELLS.values()}
    return {cls.__name__: cls(*s, dtype=dtype, key=key) for cls, s in made.items()}


def test_initialisation():
    made = jtu.tree_leaves(eqx.filter_eval_shape(initial, jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in made if isinstance(x, jax.ShapeDtypeStruct))
    made = initial(None)
    params = jtu.tree_leaves(eqx.filter(made, eqx.is_array))
    assert all(p.dtype == jnp.float64 and jnp.all(jnp.isfinite(p)) for p in params)
    for name in ("DiagonalGRU", "DiagonalLSTM"):
        assert jnp.array_equal(made[name].bias, [-np.linspace(0, 1, 6), np.zeros(6), np.zeros(6)])
    assert not made["SLSTM"].weight_h.any()
    forget = 5 - 12 * (np.arange(6) / 5) ** 0.3
    close(made["SLSTM"].bias, np.concatenate([np.zeros(6), forget, np.zeros(12)]), 1e-14)
    last = cells.SLSTM(4, 6, num_heads=2, depth=1, key=KEY).bias[6:12]
    close(last, np.tile(5 - 12 * np.array([0, 0.5, 1]) ** 1.6, 2), 1e-14)
    r, s = made["MinMax"].bias_r, made["MinMax"].bias_s
    assert jnp.all((0 < s) & (s < r)) and jnp.all(jnp.abs(made["MinMax"].weight_r) < 0.05)
    assert jnp.array_equal(made["M2RNN"].weight_h, np.tile(np.eye(5), (3, 1, 1)))
    for name in ("M2RNN", "DeltaNet", "DeltaProduct"):
        bias = made[name].bias_f if name == "M2RNN" else made[name].bias_alpha
        assert jnp.all(made[name].a_log < np.log(16))
        assert jnp.all((softplus(bias) > 0.99e-3) & (softplus(bias) < 1.01e-1))
    lru, plrnn = made["LRU"], made["PiecewiseLinearRNN"]
    close(jnp.exp(2 * lru.gamma_log), 1 - jnp.exp(-2 * jnp.exp(lru.nu)), 1e-5)
    matrix = plrnn.weight_h + jnp.diag(plrnn.decay)
    close(np.linalg.eigvalsh(matrix).max(), 1.0, 1e-14)


# --- Jacobians, written out -------------------------------------------------------------------


def test_jacobian_of_diagonal_gru():
    cell = CELLS["DiagonalGRU"]
    h, us, a = some_state(cell), one_input(cell), cell.weight_h
    z, r = jax.nn.sigmoid(a[0] * h + us[0]), jax.nn.sigmoid(a[1] * h + us[1])
    c = jnp.tanh(a[2] * h * r + us[2])
    inner = a[2] * (r + h * a[1] * r * (1 - r))
    expected = (1 - z) + (c - h) * a[0] * z * (1 - z) + z * (1 - c**2) * inner
    close(jacobian(cell, h, us), jnp.diag(expected), 1e-14)


def test_jacobian_of_diagonal_lstm():
    cell = CELLS["DiagonalLSTM"]
    (c, h), us = some_state(cell), one_input(cell)
    (a_f, a_c, a_o), (p_f, p_o) = cell.weight_h, cell.peephole
    f = jax.nn.sigmoid(a_f * h + p_f * c + us[0])
    g = jnp.tanh(a_c * h + us[1])
    new = f * c + (1 - f) * g
    o, tanh = jax.nn.sigmoid(a_o * h + p_o * new + us[2]), jnp.tanh(new)
    df, do = f * (1 - f), o * (1 - o)
    q = p_o * do * tanh + o * (1 - tanh**2)
    cc = p_f * df * (c - g) + f
    ch = a_f * df * (c - g) + (1 - f) * a_c * (1 - g**2)
    expected = jnp.block([[jnp.diag(cc), jnp.diag(ch)], [jnp.diag(cc * q), jnp.diag(ch * q)]])
    expected = expected.at[6:, 6:].add(jnp.diag(a_o * do * tanh))
    close(jacobian(cell, (c, h), us), expected, 1e-14)


@pytest.mark.parametrize("identity", [False, True])
def test_jacobian_of_m2rnn(identity):
    cell = CELLS["M2RNN"]
    if identity:  # the initial value of W makes it diagonal
        cell = eqx.tree_at(lambda c: c.weight_h, cell, jnp.tile(jnp.eye(5), (2, 1, 1)))
    H, u = some_state(cell), one_input(cell)
    _, k, v, f, _ = u
    got = jacobian(cell, H, u).reshape(2, 3, 5, 2, 3, 5)
    expected = np.zeros(got.shape)
    for n in range(2):
        Z = np.tanh(H[n] @ cell.weight_h[n] + jnp.outer(k, v[n]))
        for i in range(3):
            block = np.diag(1 - Z[i] ** 2) @ cell.weight_h[n].T
            expected[n, i, :, n, i, :] = f[n] * np.eye(5) + (1 - f[n]) * block
    close(got, expected, 1e-14)
    if identity:
        flat = np.asarray(got).reshape(30, 30)
        assert np.array_equal(flat, np.diag(np.diag(flat)))


# --- Equinox ----------------------------------------------------------------------------------


@eqx.filter_jit
def run_equinox(cell, xs):
    zero = jnp.zeros(cell.hidden_size, xs.dtype)
    init = (zero, zero) if isinstance(cell, eqx.nn.LSTMCell) else zero
    return jax.lax.scan(lambda h, x: (cell(x, h),) * 2, init, xs)[1]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_from_equinox(kind, use_bias):
    theirs = kind(4, 6, use_bias=use_bias, key=KEY)
    ours, xs = cells.from_equinox(theirs), inputs()
    assert ours.cell is theirs
    states, ys = run(ours, xs)
    close(states, run_equinox(theirs, xs), 1e-15)
    assert ys is states or jnp.array_equal(ys, states[0] if kind is eqx.nn.LSTMCell else states)
    half = cast(ours, jnp.bfloat16)
    half_ys = eqx.filter_eval_shape(lambda: prnn.RNN(half)(inputs(dtype=jnp.bfloat16), throw=False))
    assert half_ys[0].dtype == jnp.float32
    if use_bias:
        solution = prnn.RNN(ours, solver=NEWTON).solve(xs)
        close(solution.states, states, 1e-11)


def test_equinox_weights_copied():
    gru = eqx.nn.GRUCell(4, 6, key=KEY)
    where = lambda c: (c.weight_x, c.weight_h, c.bias, c.bias_n)  # noqa: E731
    weights = (gru.weight_ih, gru.weight_hh, gru.bias, gru.bias_n)
    ours = eqx.tree_at(where, CELLS["GRU"], weights)
    close(run(ours, inputs())[0], run_equinox(gru, inputs()), 1e-15)
    lstm = eqx.nn.LSTMCell(4, 6, key=KEY)
    where = lambda c: (c.weight_x, c.weight_h, c.bias)  # noqa: E731
    ours = eqx.tree_at(where, CELLS["LSTM"], (lstm.weight_ih, lstm.weight_hh, lstm.bias))
    close(run(ours, inputs())[0], run_equinox(lstm, inputs())[::-1], 1e-15)


def test_from_equinox_rejects_others():
    class Sub(eqx.nn.GRUCell):
        pass

    with pytest.raises(TypeError, match="`cell` must be an equinox.nn.GRUCell or"):
        cells.from_equinox(Sub(2, 2, key=KEY))
    with pytest.raises(TypeError, match="`cell` must be an equinox.nn.GRUCell; got"):
        cells.EquinoxGRU(Sub(2, 2, key=KEY))
    for bad in (eqx.nn.Linear(2, 2, key=KEY), eqx.nn.GRUCell, None):
        with pytest.raises(TypeError, match="cell"):
            cells.from_equinox(bad)


# --- sLSTM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_slstm_is_the_stabilised_form(gain):
    cell = eqx.tree_at(lambda c: c.weight_x, CELLS["SLSTM-heads"], replace_fn=lambda w: gain * w)
    xs = inputs(500)
    _, h = run(cell, xs)
    expected = np.stack([y for _, y in numpy_slstm(jtu.tree_map(np.asarray, cell), np.asarray(xs))])
    assert np.all(np.isfinite(expected))
    close(h, expected, 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_slstm_starts_from_nothing(dtype):
    """The initial state stands for log(0): the first output does not see how small its gate is, and
    derivatives of first and second order are finite, and 0 with respect to it."""
    cell = jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, CELLS["SLSTM-heads"])
    u = [jnp.full(6, value, dtype) for value in (-80.0, 40.0, 0.3, 0.2)]
    state = cell.init_state()
    _, v, _ = cell.step(state, u)
    close(v, jnp.tanh(u[2]), 1e-7 if dtype == jnp.float32 else 1e-15)
    first = jacobian(cell, state, u)
    assert jnp.all(jnp.isfinite(first)) and not first[:12, :12].any()
    after = cell.step(state, u)
    second = jacobian(cell, after, u)
    assert jnp.all(jnp.isfinite(second)) and second[:12, :12].any()

    def loss(bias):
        return jnp.sum(run(eqx.tree_at(lambda c: c.bias, cell, bias), xs)[1] ** 2)

    bias, xs = cell.bias, inputs(4, dtype=dtype)
    for derivative in jax.jit(lambda b: jax.jvp(jax.grad(loss), (b,), (jnp.ones_like(b),)))(bias):
        assert jnp.all(jnp.isfinite(derivative)) and derivative.any()


# --- the algebra of clamps --------------------------------------------------------------------

ALGEBRA = cells.ClampAlgebra()


def clamps(seed, *shape):
    """Bounds and states from few integers, so that ties abound."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(-2, 3, shape), float) for _ in range(3)]


def sensitivities(fn, *args):
    """The value and the derivative with respect to each argument; all is elementwise."""
    value, pull = jax.vjp(fn, *args)
    return value, pull(jnp.ones_like(value))


def test_clamp_algebra():
    (r1, s1, h), (r2, s2, _), (r3, s3, _) = (clamps(seed, 4000) for seed in range(3))
    f1, f2, f3 = (r1, s1), (r2, s2), (r3, s3)
    apply, compose = ALGEBRA.apply, ALGEBRA.compose

    def by_steps(f1, f2, f3, h):
        return apply(f3, apply(f2, apply(f1, h)))

    def left(f1, f2, f3, h):
        return apply(compose(compose(f3, f2), f1), h)

    def right(f1, f2, f3, h):
        return apply(compose(f3, compose(f2, f1)), h)

    expected = sensitivities(by_steps, f1, f2, f3, h)
    for _, grad in zip(range(7), jtu.tree_leaves(expected[1]), strict=True):
        assert set(np.unique(grad)) == {0.0, 1.0}  # never halves
    assert jnp.array_equal(sum(jtu.tree_leaves(expected[1])), jnp.ones(4000))
    for nested in (left, right):
        jtu.tree_map(np.testing.assert_array_equal, sensitivities(nested, f1, f2, f3, h), expected)

    identity = (jnp.full_like(h, jnp.inf), jnp.full_like(h, -jnp.inf))
    assert jnp.array_equal(apply(identity, h), h)
    for f in (compose(identity, f1), compose(f1, identity)):
        jtu.tree_map(
            np.testing.assert_array_equal, sensitivities(apply, f, h), sensitivities(apply, f1, h)
        )
    forget = lambda state: apply(ALGEBRA.constant(state), h)  # noqa: E731
    value, (grad,) = sensitivities(forget, s1)
    assert jnp.array_equal(value, s1) and jnp.array_equal(grad, jnp.ones(4000))


def test_clamp_ties_and_nans():
    one = jnp.ones(1)
    for (r, s, h), winner in (((1, 0, 1), 0), ((2, 1, 1), 1), ((1, 1, 1), 1), ((1, 2, 1), 1)):
        value, (element, state) = sensitivities(ALGEBRA.apply, (r * one, s * one), h * one)
        assert value == max(min(r, h), s)
        assert [int(g[0]) for g in (*element, state)] == [int(i == winner) for i in range(3)]
    for values in ((np.nan, 0, 1), (1, np.nan, 1), (1, 0, np.nan)):
        r, s, h = (x * one for x in values)
        assert jnp.isnan(ALGEBRA.apply((r, s), h)).all()


def test_min_max_by_its_algebra():
    cell, xs = CELLS["MinMax"], inputs()
    assert cell.algebra == ALGEBRA and cells.GRU.algebra is None

    @jax.jit
    def scan(xs):
        elements = jax.vmap(ALGEBRA.element)(cell.project(xs))
        compose = jax.vmap(lambda earlier, later: ALGEBRA.compose(later, earlier))
        composed = jax.lax.associative_scan(compose, elements)
        return jax.vmap(ALGEBRA.apply, in_axes=(0, None))(composed, cell.init_state())

    assert jnp.array_equal(scan(xs), run(cell, xs)[0])


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cells.Elman(4, 6, leak=0.0, key=KEY), "`leak` must be in"),
        (lambda: cells.GRU(4, 6, num_heads=4, key=KEY), "must divide `hidden_size`; got 4 for 6"),
        (lambda: cells.LSTM(4, 6, num_heads=0, key=KEY), "`num_heads` must be at least 1; got 0"),
        (lambda: cells.SLSTM(4, 0, key=KEY), "`hidden_size` must be at least 1"),
        (lambda: cells.DiagonalLSTM(4, 6, num_heads=3, key=KEY), "must divide `input_size`"),
        (lambda: cells.MinMax(4, 6, 0, key=KEY), "`output_size` must be at least 1"),
        (lambda: cells.M2RNN(4, 2, conv_width=-1, key=KEY), "`conv_width`"),
        (lambda: cells.DeltaNet(4, 2, 0, 2, key=KEY), "`key_size`"),
        (lambda: cells.LRU(4, 6, r_min=0.9, r_max=0.5, key=KEY), "`r_min` and `r_max`"),
        (lambda: cells.LRU(4, 6, max_phase=7.0, key=KEY), "`max_phase`"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each_cell
def test_input_size(name):
    shape = input_shape(CELLS[name])
    size = str(shape)[1:].rstrip(",)")
    with pytest.raises(ValueError, match=rf"`xs` must have shape .* = \(L, {size}\); got \(5, 3"):
        CELLS[name].project(jnp.zeros((5, 3, *shape[1:])))


def test_checks():
    """What the annotations, which are checked in these tests only, would catch before."""
    for shape in ((4,), (2, 5, 4)):
        with pytest.raises(ValueError, match="`xs` must have shape"):
            check_inputs(jnp.zeros(shape), 4)
    for size in (4.0, True, None):
        with pytest.raises(TypeError, match="`input_size` must be a Python int; got"):
            check_sizes(input_size=size)
