"""What cells are made of, each part against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.cells import _decay
from pararnn.cells import _parts as parts
from pararnn.cells._base import head_sizes

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(got, expected, tol=1e-14):
    assert np.shape(got) == np.shape(expected)
    np.testing.assert_allclose(got, expected, rtol=tol, atol=tol)


# --- maps of all inputs -----------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
def test_affine_and_gates(with_bias):
    weight, xs = random(6, 4), random(5, 4, seed=1)
    bias = random(6, seed=2) if with_bias else None
    expected = np.stack([weight @ x + (0 if bias is None else bias) for x in xs])
    arrays = [None if a is None else jnp.asarray(a) for a in (weight, bias, xs)]
    close(parts.affine(*arrays), expected)
    gates = parts.project_gates(*arrays, 3)
    for gate, rows in zip(gates, (slice(0, 2), slice(2, 4), slice(4, 6)), strict=True):
        close(gate, expected[:, rows])


def test_linear_map_of_blocks():
    blocks, xs = random(3, 4, 2), random(5, 6, seed=1)
    expected = np.concatenate([xs[:, 2 * n : 2 * n + 2] @ blocks[n].T for n in range(3)], 1)
    weight = jnp.asarray(blocks.reshape(12, 2))
    close(parts.linear(weight, jnp.asarray(xs)), expected)
    assert parts.linear(weight, jnp.zeros((0, 6))).shape == (0, 12)


def test_short_conv_silu():
    weight, xs = jnp.asarray(random(3, 2)), jnp.asarray(random(5, 2, seed=1))
    y = np.asarray(prnn.cells.causal_convolution(weight, xs))
    close(parts.short_conv_silu(weight, xs), y / (1 + np.exp(-y)))
    assert parts.short_conv_silu(None, xs) is xs
    assert parts.short_conv_silu(weight[:0], xs, jnp.ones(2)) is xs
    y = y + np.array([0.5, -1])
    close(parts.short_conv_silu(weight, xs, jnp.asarray([0.5, -1])), y / (1 + np.exp(-y)))
    assert parts.init_convolution(KEY, 0, 2, None) is None


def test_project_heads():
    weight, bias, xs = random(2, 3, 2, 4), random(2, 6, seed=1), random(5, 12, seed=2)
    got = parts.project_heads(jnp.asarray(weight), jnp.asarray(bias), jnp.asarray(xs))
    for gate in range(2):
        dense = np.zeros((6, 12))
        for n in range(3):
            dense[2 * n : 2 * n + 2, 4 * n : 4 * n + 4] = weight[gate, n]
        close(got[gate], xs @ dense.T + bias[gate])


@pytest.mark.parametrize("num_heads", [1, 3])
def test_recur_heads(num_heads):
    gates, size = 2, 6 // num_heads
    weight, state = random(6 * gates, size), random(6, seed=1)
    got = parts.recur_heads(jnp.asarray(weight), jnp.asarray(state))
    assert len(got) == gates
    for gate in range(gates):
        dense = np.zeros((6, 6))
        for n in range(num_heads):
            units, row = slice(n * size, (n + 1) * size), (n * gates + gate) * size
            dense[units, units] = weight[row : row + size]
        close(got[gate], dense @ state)


@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("width", [1, 4])
def test_causal_convolution(width, length):
    """Also where it reaches over more steps than there are."""
    weight, xs = random(width, 3), random(length, 3, seed=1)
    expected = np.zeros((length, 3))
    for t in range(length):
        for lag in range(min(width, t + 1)):
            expected[t] += weight[width - 1 - lag] * xs[t - lag]
    close(prnn.cells.causal_convolution(jnp.asarray(weight), jnp.asarray(xs)), expected)


def test_causal_convolution_sums_in_float32():
    """In bfloat16, 1 beside 256 would be lost."""
    xs = jnp.asarray([[256.0], [1.0], [-256.0], [0.0]], jnp.bfloat16)
    got = prnn.cells.causal_convolution(jnp.ones((3, 1), jnp.bfloat16), xs)
    assert got.dtype == jnp.bfloat16
    assert got.ravel().tolist() == [256.0, 256.0, 1.0, -255.0]  # 257 is rounded at the end


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("shapes", [((4, 1), (5, 3)), ((0, 3), (5, 3)), ((3,), (5, 3))])
def test_causal_convolution_refuses_other_shapes(shapes):
    weight, xs = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"`weight` must have shape \(width, channels\).*\(5, 3\)"):
        prnn.cells.causal_convolution(weight, xs)


# --- heads, keys, decay -----------------------------------------------------------------------


def test_heads():
    x = random(5, 6)
    heads = parts.split_heads(jnp.asarray(x), 3)
    close(heads, np.stack([x[:, 0:2], x[:, 2:4], x[:, 4:6]], axis=1), 0)
    close(parts.merge_heads(heads), x, 0)
    empty = parts.split_heads(jnp.zeros((0, 6), complex), 3)
    assert empty.shape == (0, 3, 2) and parts.merge_heads(empty).shape == (0, 6)
    close(parts.merge_heads(parts.split_heads(jnp.asarray(x[0]), 2)), x[0], 0)


def test_head_sizes():
    assert head_sizes(3, input_size=6, hidden_size=12) == [2, 4]
    with pytest.raises(ValueError, match="`num_heads` must divide `b`; got 2 for 5"):
        head_sizes(2, a=4, b=5)
    with pytest.raises(ValueError, match="`a` must be at least 1; got 0"):
        head_sizes(2, a=0)


def test_l2_normalize():
    x = random(5, 2, 3)
    norms = np.sqrt(np.sum(x**2, axis=-1, keepdims=True))
    close(parts.l2_normalize(jnp.asarray(x)), x / norms, 1e-5)
    close(jnp.sum(parts.l2_normalize(jnp.asarray(x)) ** 2, -1), np.ones((5, 2)), 1e-4)
    assert parts.l2_normalize(jnp.zeros(3, jnp.bfloat16)).dtype == jnp.float32
    value, slope = jax.jvp(parts.l2_normalize, (jnp.zeros(3),), (jnp.asarray([1.0, 0.0, -2.0]),))
    assert not value.any()
    close(slope, np.array([1e3, 0, -2e3]), 1e-9)


def test_decay():
    raw, a_log, bias = random(5, 2), random(2, seed=1), random(2, seed=2)
    got = _decay.rate_decay(*(jnp.asarray(a) for a in (raw, a_log, bias)))
    close(got, np.exp(-np.exp(a_log) * np.log(1 + np.exp(raw + bias))))
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (-7 + raw, a_log, bias)]
    got = _decay.rate_decay(*narrow)
    assert got.dtype == jnp.float32
    raw, a_log, bias = (np.asarray(a, np.float64) for a in narrow)
    close(got, np.exp(-np.exp(a_log) * np.log1p(np.exp(raw + bias))), 1e-6)


def test_log_gate():
    raw = random(4, 3)
    expected = -np.log1p(np.exp(-raw))
    close(_decay.log_gate(jnp.asarray(raw)), expected)
    close(_decay.log_gate(jnp.asarray(raw), 16), expected / 16)
    assert _decay.log_gate(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32


def decays_one_by_one(decay, reset):
    """From each step to each step, and from before all of them, by products; heads first."""
    length, heads = decay.shape
    found = np.zeros((heads, length, 1 + length))
    for start in range(-1, length):
        product = np.ones(heads)
        if start >= 0:
            found[:, start, 1 + start] = 1
        for t in range(start + 1, length):
            product = product * (0 if reset[t] else decay[t])
            found[:, t, 1 + start] = product
    return found[:, :, 1:], found[:, :, 0]


@pytest.mark.parametrize("resets", [(), (0, 3, 4)])
@pytest.mark.parametrize("zero", [False, True])
def test_segment_decays(resets, zero):
    """By products and by logarithms; and the derivative by products, where a decay is 0, too."""
    decay = np.random.default_rng(0).uniform(0.1, 1, (7, 2))
    decay[5] = 0 if zero else 1e-6
    reset = np.isin(np.arange(7), resets)
    flags = jnp.asarray(reset) if resets else None
    expected = decays_one_by_one(decay, reset)
    for got, right in zip(_decay.segment_decays(jnp.asarray(decay), flags), expected, strict=True):
        close(got, right)
    with np.errstate(divide="ignore"):
        logs = jnp.asarray(np.log(decay))
    for got, right in zip(_decay.segment_log_decays(logs, flags), expected, strict=True):
        close(np.exp(got), right)
    step = 1e-3  # products are linear in each decay: central differences are exact
    slope = jax.jacfwd(lambda d: _decay.segment_decays(d, flags))(jnp.asarray(decay))
    for t in range(7):
        moved = step * np.eye(7)[:, t : t + 1]
        ends = [decays_one_by_one(decay + sign * moved, reset) for sign in (1, -1)]
        for got, high, low in zip(slope, *ends, strict=True):
            close(jnp.sum(got[..., t, :], axis=-1), (high - low) / (2 * step), 1e-11)


# --- dtypes and states ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(dtype):
    x = jnp.asarray([0.1, 3.0], dtype)
    expected = "float64" if dtype == "float64" else "float32"
    assert parts.at_least_float32(x).dtype == expected
    assert jnp.array_equal(parts.at_least_float32(x).astype(dtype), x)
    zero = parts.zero_state((2, 3), x)
    assert zero.dtype == expected and zero.shape == (2, 3) and not zero.any()


# --- initial parameters -----------------------------------------------------------------------


def fills(x, low, high):
    """Whether numbers lie in an interval and reach near both ends."""
    margin = 0.1 * (high - low)
    assert np.all((low <= x) & (x <= high))
    assert np.min(x) < low + margin and np.max(x) > high - margin


@jax.jit
def draw(key):
    drawn = {
        "uniform": parts.uniform(key, (300,), 0.3, None),
        "normal": parts.normal(key, (300,), 0.3, None),
        "log uniform": parts.log_uniform(key, (300,), 1e-3, 0.1),
        "linear": parts.init_linear(key, 20, 16, None),
        "vectors": parts.init_vectors(key, 30, 20, None),
        "decay": _decay.init_decay(300, None, key),
        "gates": parts.init_gates(3, 7, 16, 4, jnp.float32, jax.random.split(key, 3)),
        "diagonal": parts.init_diagonal_gates(2, 8, 20, 4, None, jax.random.split(key)),
    }
    narrow = [draw(key, (2,), 1.0, jnp.bfloat16) for draw in (parts.uniform, parts.normal)]
    return drawn, [*narrow, *_decay.init_decay(2, jnp.bfloat16, key)]


def test_distributions():
    drawn, narrow = draw(KEY)
    assert all(x.dtype == jnp.bfloat16 for x in narrow)
    for name in ("uniform", "normal", "log uniform", "linear", "vectors"):
        assert drawn[name].dtype == jnp.float64
    rates = (np.log(1e-3), np.log(0.1))
    fills(drawn["uniform"], -0.3, 0.3)
    fills(np.log(drawn["log uniform"]), *rates)
    close(np.std(drawn["normal"]), 0.3, 0.03)
    fills(drawn["linear"], -0.25, 0.25)
    close(np.std(drawn["vectors"]), 0.2, 0.02)
    a_log, bias = drawn["decay"]
    fills(np.exp(a_log), 0, 16)
    fills(np.log(np.log1p(np.exp(bias))), *rates)


def test_inverse_softplus():
    x = np.geomspace(1e-6, 50, 20)
    close(parts.inverse_softplus(jnp.asarray(x)), np.log(np.expm1(x)), 1e-9)


def test_gates():
    weight_x, weight_h, bias = draw(KEY)[0]["gates"]
    assert (weight_x.shape, weight_h.shape, bias.shape) == ((48, 7), (48, 4), (48,))
    assert {x.dtype for x in (weight_x, weight_h, bias)} == {jnp.dtype(jnp.float32)}
    for x, limit in ((weight_x, 0.25), (weight_h, 0.5), (bias, 0.25)):
        fills(x, -limit, limit)
    assert not np.isin(np.ravel(weight_x), np.ravel(weight_h) / 2).any()  # other keys
    for sizes, name in (((0, 16, 4), "input_size"), ((7, 0, 1), "hidden_size")):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
            parts.init_gates(3, *sizes, None, [KEY] * 3)
    with pytest.raises(ValueError, match="`num_heads` must divide `hidden_size`; got 4 for 6"):
        parts.init_gates(3, 7, 6, 4, None, [KEY] * 3)


def test_diagonal_gates():
    weight_x, weight_h, bias = draw(KEY)[0]["diagonal"]
    assert (weight_x.shape, weight_h.shape) == ((2, 4, 5, 2), (2, 20))
    fills(weight_x, -np.sqrt(6 / 22), np.sqrt(6 / 22))
    close(bias, np.stack([-np.arange(20) / 19, np.zeros(20)]), 1e-15)
    with pytest.raises(ValueError, match="`num_heads` must divide `input_size`; got 4 for 6"):
        parts.init_diagonal_gates(2, 6, 20, 4, None, [KEY] * 2)
