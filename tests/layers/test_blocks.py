"""The blocks of xLSTM and of gated DeltaNet against their formulas, transcribed to NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import error, normal

import pararnn as prnn

WIDTH, LENGTH, HEADS, TAPS = 8, 9, 2, 3


def make(method, **options):
    """A block with random parameters throughout: none is zero, or one."""
    block = method(WIDTH, num_heads=HEADS, conv_width=TAPS, key=jax.random.key(0), **options)
    rng = np.random.default_rng(7)

    def fill(x):
        return jnp.asarray(0.5 * rng.standard_normal(x.shape)) if eqx.is_array(x) else x

    return jtu.tree_map(fill, block)


# --- the formulas -----------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms_norm(norm, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.eps) * norm.weight


def head_norm(y, weight, centred, eps=1e-5):
    """`y` has an axis of steps, one of heads, and one of features."""
    if centred:
        y = y - y.mean(2, keepdims=True)
    y = y / np.sqrt((y**2).mean(2, keepdims=True) + eps) * weight
    return y.reshape(len(y), -1)


def convolution(weight, xs):
    """Written out: output, tap, input."""
    ys = np.zeros_like(xs)
    for t in range(len(xs)):
        for j in range(min(len(weight), t + 1)):
            ys[t] += weight[len(weight) - 1 - j] * xs[t - j]
    return silu(ys)


def dense(weight, blocks):
    """The matrix with these blocks on its diagonal, one below the other in `weight`."""
    rows, columns = len(weight) // blocks, weight.shape[1]
    full = np.zeros((len(weight), blocks * columns))
    for n in range(blocks):
        rows_of = slice(n * rows, (n + 1) * rows)
        full[rows_of, n * columns : (n + 1) * columns] = weight[rows_of]
    return full


def mlp(block, x, activation):
    n, m = rms_norm(block.mlp_norm, x), block.mlp
    return (activation(n @ m.gate.weight.T) * (n @ m.up.weight.T)) @ m.down.weight.T


def numpy_mlstm(block, xs):
    """By the stabilised recurrence of the paper."""
    cell, n, size = block.rnn.cell, rms_norm(block.norm, xs), 2 * WIDTH // HEADS
    inner = n @ block.inputs.weight.T
    seen = convolution(cell.weight_conv, inner)
    maps = (dense(w, 2 * WIDTH // 4) for w in (cell.weight_q, cell.weight_k, cell.weight_v))
    pairs = zip(maps, (seen, seen, inner), strict=True)
    q, k, v = ((x @ w.T).reshape(LENGTH, HEADS, size) for w, x in pairs)
    i = inner @ cell.weight_i.T + cell.bias_i
    f = np.log(sigmoid(inner @ cell.weight_f.T + cell.bias_f))
    C, N, m = np.zeros((HEADS, size, size)), np.zeros((HEADS, size)), np.full(HEADS, -np.inf)
    y = np.zeros((LENGTH, HEADS, size))
    for t in range(LENGTH):
        new = np.maximum(f[t] + m, i[t])
        kept, share = np.exp(f[t] + m - new), np.exp(i[t] - new)
        m = new
        for h in range(HEADS):
            key = k[t, h] / np.sqrt(size)
            C[h] = kept[h] * C[h] + share[h] * np.outer(v[t, h], key)
            N[h] = kept[h] * N[h] + share[h] * key
            y[t, h] = C[h] @ q[t, h] / max(abs(N[h] @ q[t, h]), np.exp(-m[h]))
    y = head_norm(y, cell.weight_norm, centred=True) + cell.skip * seen
    return xs + (y * silu(n @ block.gate.weight.T)) @ block.output.weight.T


def numpy_slstm(block, xs):
    """By the stabilised recurrence of the paper."""
    cell, n, size = block.rnn.cell, rms_norm(block.norm, xs), WIDTH // HEADS
    seen = convolution(cell.weight_conv, n)
    raw = [
        x @ dense(w, HEADS).T + b
        for w, b, x in zip(
            np.split(cell.weight_x, 4), np.split(cell.bias, 4), (seen, seen, n, n), strict=True
        )
    ]
    # Rows of the recurrent matrices go over heads, then over gates.
    recurrent = [
        dense(w.reshape(WIDTH, size), HEADS)
        for w in np.moveaxis(cell.weight_h.reshape(HEADS, 4, size, size), 1, 0)
    ]
    h = c = count = np.zeros(WIDTH)
    m, y = np.full(WIDTH, -np.inf), np.zeros((LENGTH, WIDTH))
    for t in range(LENGTH):
        i, f, z, o = (u[t] + w @ h for u, w in zip(raw, recurrent, strict=True))
        kept = m + np.log(sigmoid(f))
        m = np.maximum(kept, i)
        c = np.exp(kept - m) * c + np.exp(i - m) * np.tanh(z)
        count = np.exp(kept - m) * count + np.exp(i - m)
        y[t] = h = sigmoid(o) * c / count
    a = xs + head_norm(y.reshape(LENGTH, HEADS, size), cell.weight_norm, centred=True)
    return a + mlp(block, a, gelu)


def numpy_gated_deltanet(block, xs):
    cell, n = block.rnn.cell, rms_norm(block.norm, xs)
    K, V = cell.key_size, cell.value_size
    assert (K, V, cell.norm_eps) == (3, 6, 1e-5)
    weights = np.split(cell.weight_conv, [HEADS * K, 2 * HEADS * K], axis=1)
    maps = (cell.weight_q, cell.weight_k, cell.weight_v)
    q, k, v = (
        convolution(weight, n @ w.T).reshape(LENGTH, HEADS, -1)
        for weight, w in zip(weights, maps, strict=True)
    )
    q, k = (x / np.sqrt(np.sum(x**2, 2, keepdims=True) + 1e-6) for x in (q, k))
    beta = sigmoid(n @ cell.weight_beta.T)
    rate = np.log1p(np.exp(n @ cell.weight_alpha.T + cell.bias_alpha))
    alpha = np.exp(-np.exp(cell.a_log) * rate)
    S, y = np.zeros((HEADS, V, K)), np.zeros((LENGTH, HEADS, V))
    for t in range(LENGTH):
        for h in range(HEADS):
            turn = alpha[t, h] * (np.eye(K) - beta[t, h] * np.outer(k[t, h], k[t, h]))
            S[h] = S[h] @ turn + beta[t, h] * np.outer(v[t, h], k[t, h])
            y[t, h] = S[h] @ q[t, h] / np.sqrt(K)
    y = head_norm(y, cell.weight_norm, centred=False) * silu(n @ cell.weight_g.T)
    a = xs + y @ cell.weight_o.T
    return a + mlp(block, a, silu)


BLOCKS = {
    "mLSTM": (prnn.mlstm_block, numpy_mlstm),
    "sLSTM": (prnn.slstm_block, numpy_slstm),
    "gated DeltaNet": (prnn.gated_deltanet_block, numpy_gated_deltanet),
}
over_blocks = pytest.mark.parametrize(
    "method, transcribed", BLOCKS.values(), ids=list(BLOCKS.keys())
)


@over_blocks
def test_values_and_gradients(method, transcribed):
    """Values against NumPy; those and gradients against a scan of the step, chunks of any kind
    aside."""
    block, xs = make(method), normal(0, (LENGTH, WIDTH))

    def scanned(block, xs):
        def body(state, x):
            y, state = block.step(state, x)
            return state, y

        final, ys = jax.lax.scan(body, block.init_state(), xs)
        return ys, final

    def gradients(call):
        def loss(block, xs):
            ys, state = call(block, xs)
            return jnp.sum(jnp.sin(3 * ys)), (ys, state)

        return eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(block, xs)

    got, expected = (gradients(call) for call in (lambda block, xs: block(xs), scanned))
    numpy_block = jtu.tree_map(lambda x: np.asarray(x) if eqx.is_array(x) else x, block)
    ys = transcribed(numpy_block, np.asarray(xs))
    assert error(got[0][1][0], jnp.asarray(ys)) <= 1e-12
    got, expected = (eqx.filter(tree, eqx.is_array) for tree in (got, expected))
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        assert error(a, b) <= 1e-9
    assert all(np.any(g != 0) for g in jtu.tree_leaves(got[1]))


@over_blocks
def test_without_convolution_there_is_no_context(method, transcribed):
    block = method(WIDTH, num_heads=HEADS, conv_width=0, key=jax.random.key(0))
    assert block.rnn.cell.context == 0 and block.rnn.cell.weight_conv is None
    one, both = block(jnp.ones((1, WIDTH)))[0], block(jnp.stack([jnp.zeros(WIDTH)] * 2))
    assert one.shape == (1, WIDTH) and both[0].shape == (2, WIDTH)


def test_parameters_of_the_mlstm_block():
    """The maps to queries, keys and values have few: three of the inner width hold nearly all."""
    block = prnn.mlstm_block(64, key=jax.random.key(0))
    large = 3 * 64 * 128
    small = sum(x.size for x in jtu.tree_leaves(eqx.filter(block, eqx.is_array))) - large
    assert 3 * 4 * 128 < small < 0.15 * large


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda key: prnn.mlstm_block(8, num_heads=3, key=key), "`num_heads` must divide.*16"),
        (lambda key: prnn.mlstm_block(6, num_heads=2, block_size=5, key=key), "`block_size`"),
        (lambda key: prnn.slstm_block(6, key=key), "must divide `input_size`; got 4 for 6"),
        (lambda key: prnn.slstm_block(4, depth=2, key=key), r"`depth` must be in \[0, 1\]"),
        (lambda key: prnn.MLSTM(6, 2, 3, 4, bare=True, key=key), "With `bare`.* 6; got 8 and 6"),
        (lambda key: prnn.MLSTM(6, 2, 3, 4, conv_width=-1, key=key), "`conv_width` must be at"),
        (lambda key: prnn.DeltaNet(6, 2, 3, 4, conv_width=-1, key=key), "`conv_width` must be at"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(jax.random.key(0))


HALF = [
    *(method for method, _ in BLOCKS.values()),
    *(prnn.mamba_block, prnn.minmax_block),
]


@pytest.mark.parametrize("method", HALF, ids=lambda method: method.__name__)
def test_half_precision(method):
    """Nothing is promoted silently; outputs have the dtype of the inputs."""
    block = eqx.filter_eval_shape(method, WIDTH, dtype=jnp.bfloat16, key=jax.random.key(0))
    xs = jax.ShapeDtypeStruct((LENGTH, WIDTH), jnp.bfloat16)

    def loss(arguments):
        block, xs = arguments
        ys, final = block(xs, throw=False)
        return jnp.sum(ys), (ys, final, block.step(block.init_state(), xs[0]))

    gradient = eqx.filter_value_and_grad(loss, has_aux=True)
    (_, (ys, final, (y, after))), grads = eqx.filter_eval_shape(gradient, (block, xs))
    assert ys == xs and y.dtype == xs.dtype and after == final
    assert {g.dtype for g in jtu.tree_leaves(grads) if hasattr(g, "dtype")} == {xs.dtype}
