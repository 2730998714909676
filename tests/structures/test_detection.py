"""Structure detection: sound against true Jacobians, tight where it should be, cheap."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import normal

import pararnn as prnn
from pararnn._misc import make_ravel
from pararnn.jaxprs import _dependence
from pararnn.jaxprs._walk import open_jaxpr


def vectors(size=6):
    return jnp.zeros(size)


def pair(size=4):
    return {"c": jnp.zeros(size), "h": jnp.zeros(size)}


W = normal(0, (6, 6))
PERMUTATION = np.asarray([3, 0, 5, 1, 4, 2])

# --- steps with a custom derivative ---------------------------------------------------------------


@jax.custom_jvp
def _coupling_rule(h):
    return jnp.tanh(h)


@_coupling_rule.defjvp
def _(primals, tangents):
    """The derivative couples what the values do not. It is what solvers see."""
    (h,), (t,) = primals, tangents
    return _coupling_rule(h), t * jnp.sum(h) + jnp.roll(t, 2)


@jax.custom_jvp
def _decoupling_rule(h):
    return jnp.sum(h) * jnp.ones_like(h)


@_decoupling_rule.defjvp
def _(primals, tangents):
    (h,), (t,) = primals, tangents
    return _decoupling_rule(h), 2 * t


@jax.custom_jvp
def _elementwise_rule(h):
    return jnp.where(h > 0, h, 0.1 * h)


@_elementwise_rule.defjvp
def _(primals, tangents):
    (h,), (t,) = primals, tangents
    return _elementwise_rule(h), jnp.exp(h) * t


# --- steps ----------------------------------------------------------------------------------------


def _gru(h, x):
    z, r = jax.nn.sigmoid(W[0] * h + x), jax.nn.sigmoid(W[1] * h - x)
    return (1 - z) * jnp.tanh(x + W[2] * r * h) + z * h


def _taken_apart(h, x):
    a, b = h
    return jnp.tanh(jnp.stack([a - b, a + b]))


def _dense_gru(h, x):
    z, r = jax.nn.sigmoid(W @ h + x), jax.nn.sigmoid(W.T @ h - x)
    return (1 - z) * jnp.tanh(x + W @ (r * h)) + z * h


def _lstm(state, x):
    f, i, o = (jax.nn.sigmoid(w * state["h"] + x) for w in (0.3, 0.4, 0.5))
    c = f * state["c"] + i * jnp.tanh(0.7 * state["h"])
    return {"c": c, "h": o * jnp.tanh(c)}


def _slstm(state, x):
    """Exponential gates with a stabiliser: blocks of four elements across the leaves."""
    m = jnp.maximum(state["f"] + state["m"], x + 0.1 * state["h"])
    i, f = jnp.exp(x - m), jnp.exp(state["f"] + state["m"] - m)
    n = f * state["n"] + i
    return {"f": jnp.tanh(state["h"]), "m": m, "n": n, "h": jnp.tanh(x) / jnp.maximum(n, 1e-3)}


HEADS = normal(1, (3, 2, 2))


def _heads_einsum(h, x):
    return jnp.tanh(jnp.einsum("hij,hj->hi", HEADS, h.reshape(3, 2)).reshape(-1) + x)


def _heads_vmap(h, x):
    return jnp.tanh(jax.vmap(jnp.matmul)(HEADS, h.reshape(3, 2)).ravel() + x)


def _heads_transposed(h, x):
    """Head `g` holds the elements `g`, `g + 3`."""
    return jnp.tanh(jnp.einsum("hij,jh->ih", HEADS, h.reshape(2, 3)).reshape(-1) + x)


def _matrix_columns(m, x):
    """The columns are rotated by one matrix: each column is a group."""
    return jnp.tanh(W[:3, :3] @ m + x)


def _matrix_rows(m, x):
    return jnp.tanh(m @ W[:2, :2] + x)


def _matrix_of_heads(m, x):
    """K blocks of V × V: each row of the state of each head is multiplied by the head's matrix."""
    return jnp.tanh(jnp.einsum("hkv,hvw->hkw", m, HEADS)) * x


def _outer(m, x):
    """A read and a write: everything in a row meets."""
    k = jnp.tanh(jnp.arange(2.0) + x)
    return m - jnp.outer(m @ k, k) + x


def _scan_inside(h, x):
    def body(carry, w):
        return jnp.tanh(w * carry + x), carry

    carry, ys = jax.lax.scan(body, h, jnp.arange(1.0, 4.0))
    return carry + ys[1]


def _scan_that_rolls(h, x):
    """Each turn passes information one element further: all to all after six."""
    return jax.lax.scan(lambda c, _: (jnp.tanh(c + jnp.roll(c, 1)), None), h + x, length=6)[0]


def _scan_over_state(h, x):
    """Slices of the state are what is scanned over; reversed."""

    def body(carry, element):
        return carry + 1.0, jnp.sin(element) * carry

    return jax.lax.scan(body, x, h, reverse=True)[1]


def _while_inside(h, x):
    def body(carry):
        i, h = carry
        return i + 1, jnp.tanh(h + x)

    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, h))[1]


def _while_that_swaps(h, x):
    """Two halves change places at each turn."""

    def body(i, pair):
        a, b = pair
        return jnp.sin(b) + x, jnp.cos(a)

    return jnp.concatenate(jax.lax.fori_loop(0, 2, body, (h[:3], h[3:])))


def _while_until(h, x):
    """A number of turns that depends on the state."""
    return jax.lax.while_loop(lambda h: jnp.sum(h) < 5, lambda h: jnp.abs(h) * 1.5 + 1, h) + x


def _cond_inside(h, x):
    branch = jnp.clip(jnp.floor(jnp.abs(x) * 3), 0, 2).astype(int)
    return jax.lax.switch(branch, [jnp.sin, lambda h: h[::-1], lambda h: 0 * h], h)


def _cond_on_state(h, x):
    return jax.lax.cond(h[0] > 0, lambda: jnp.tanh(h), lambda: h * x)


def _sort(h, x):
    return jnp.sort(h) + x


def _conv(h, x):
    return jnp.convolve(jnp.tanh(h), jnp.asarray([0.2, 0.5, 0.2]), mode="same") + x


def _depthwise_conv(m, x):
    """Channels do not meet."""
    out = jax.lax.conv_general_dilated(
        m[None], jnp.ones((2, 1, 3)), (1,), "SAME", feature_group_count=2
    )
    return jnp.tanh(out[0]) + x


def _gather(h, x):
    return jnp.tanh(h[PERMUTATION] + x)


def _dynamic_index(h, x):
    i = jnp.clip(jnp.floor(jnp.abs(x)), 0, 5).astype(int)
    return h + jax.lax.dynamic_slice(h, (i,), (1,))


def _scatter(h, x):
    return h.at[np.asarray([1, 4])].set(jnp.sin(h[np.asarray([2, 5])])) + x


def _solve_triangular(h, x):
    return jax.scipy.linalg.solve_triangular(jnp.eye(6) * 2 + jnp.tril(W, -1), h, lower=True) + x


def _linear_solve(h, x, inverse):
    return jax.lax.custom_linear_solve(
        lambda v: v * (2 + jnp.tanh(h)), jnp.sin(h) + x, inverse(h), inverse(h)
    )


def _by_division(h):
    return lambda _, b: b / (2 + jnp.tanh(h))


def _by_iteration(h):
    """Steepest descent: everything meets."""

    def solve(matrix, b):
        def body(_, v):
            r = b - matrix(v)
            return v + r * jnp.sum(r * r) / jnp.sum(r * matrix(r))

        return jax.lax.fori_loop(0, 4, body, b)

    return solve


def _fft(h, x):
    return jnp.real(jnp.fft.ifft(jnp.fft.fft(h) * jnp.arange(6.0).astype(complex))) + x


def _softmax(h, x):
    return jax.nn.softmax(h) + x


def _normalised(h, x):
    return h / jnp.sqrt(1e-3 + jnp.mean(h**2)) + x


def _by_key(h, x):
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, h.shape)
    return jnp.where(mask, jnp.tanh(h + x), h)


# Name: (step, initial state, the groups that must be found or None for all elements in one).
SCALAR = jnp.zeros(())
DIAGONAL = "diagonal"
ANY = "any"  # only soundness is asked for
STEPS = {
    "elementwise": (lambda h, x: jnp.tanh(0.5 * h + x), vectors(), DIAGONAL),
    "scalar": (lambda h, x: jnp.sin(h * x), SCALAR, DIAGONAL),
    "identity": (lambda h, x: h, vectors(), DIAGONAL),
    "constant": (lambda h, x: 0 * jnp.ones(6) + x, vectors(), DIAGONAL),
    "many functions": (
        lambda h, x: jnp.exp(-jnp.abs(h)) + jnp.log1p(h**2) * jnp.sign(h) + jax.nn.gelu(h) ** 3 / 2
        + jax.lax.rsqrt(1 + h * h) + jnp.arctan2(h, 1 + x) + jax.scipy.special.erf(h)
        + jnp.maximum(h, x) + jax.nn.relu(-h) + jax.nn.softplus(h) + jax.nn.silu(h) + h % 1.0,
        vectors(), DIAGONAL,
    ),
    "GRU": (_gru, vectors(), DIAGONAL),
    "dense GRU": (_dense_gru, vectors(), None),
    "LSTM": (_lstm, pair(), [[i, i + 4] for i in range(4)]),
    "LSTM in two leaves that do not meet": (
        lambda s, x: {"c": s["c"] * x, "h": jnp.tanh(s["h"])}, pair(), DIAGONAL,
    ),
    "sLSTM": (
        _slstm, {k: jnp.ones(3) for k in "fmnh"}, [[i, i + 3, i + 6, i + 9] for i in range(3)],
    ),
    "heads by einsum": (_heads_einsum, vectors(), [[0, 1], [2, 3], [4, 5]]),
    "heads by vmap": (_heads_vmap, vectors(), [[0, 1], [2, 3], [4, 5]]),
    "transposed heads": (_heads_transposed, vectors(), [[0, 3], [1, 4], [2, 5]]),
    "columns of a matrix": (_matrix_columns, jnp.zeros((3, 2)), [[0, 2, 4], [1, 3, 5]]),
    "rows of a matrix": (_matrix_rows, jnp.zeros((3, 2)), [[0, 1], [2, 3], [4, 5]]),
    "heads of matrices": (
        _matrix_of_heads, jnp.zeros((3, 2, 2)), [[i, i + 1] for i in range(0, 12, 2)],
    ),
    "outer products": (_outer, jnp.zeros((3, 2)), [[0, 1], [2, 3], [4, 5]]),
    "slices": (
        lambda h, x: jnp.concatenate([h[1:2] * h[:1], h[:1], h[2:] * x]), vectors(),
        [[0, 1], [2], [3], [4], [5]],
    ),
    "strided": (lambda h, x: jnp.stack([h[::2] * h[1::2], h[1::2]], axis=1).ravel(), vectors(),
                [[0, 1], [2, 3], [4, 5]]),
    "roll": (lambda h, x: jnp.roll(jnp.tanh(h), 2) + x, vectors(), [[0, 2, 4], [1, 3, 5]]),
    "reverse": (lambda h, x: h[::-1] * x, vectors(), [[0, 5], [1, 4], [2, 3]]),
    "pad": (
        lambda h, x: jnp.pad(h[:2], (1, 5)) + x, vectors(8), [[0, 1, 2], [3], [4], [5], [6], [7]],
    ),
    "interior and negative pad": (
        lambda h, x: jax.lax.pad(h[:4], 0.0, [(-1, 0, 1)]) + x, vectors(), ANY,
    ),
    "cumsum": (lambda h, x: jnp.cumsum(h.reshape(3, 2), axis=1).ravel() + x, vectors(),
               [[0, 1], [2, 3], [4, 5]]),
    "cumulative maximum": (lambda h, x: jax.lax.cummax(h) + x, vectors(), ANY),
    "cumulative product": (lambda h, x: jnp.cumprod(h) + x, vectors(), ANY),
    "reductions": (
        lambda h, x: jnp.repeat(jnp.stack([h[:2].sum(), h[2:4].max(), h[4:].prod()]), 2), vectors(),
        [[0, 1], [2, 3], [4, 5]],
    ),
    "minimum": (lambda h, x: jnp.min(h) + h * x, vectors(), None),
    "sort": (_sort, vectors(), ANY),
    "convolution": (_conv, vectors(), ANY),
    "depthwise convolution": (_depthwise_conv, jnp.zeros((2, 4)), ANY),
    "gather": (_gather, vectors(), ANY),
    "dynamic index": (_dynamic_index, vectors(), ANY),
    "scatter": (_scatter, vectors(), ANY),
    "triangular solve": (_solve_triangular, vectors(), ANY),
    "linear solve": (functools.partial(_linear_solve, inverse=_by_division), vectors(), DIAGONAL),
    "linear solve that couples": (
        functools.partial(_linear_solve, inverse=_by_iteration), vectors(), None,
    ),
    "FFT": (_fft, vectors(), ANY),
    "softmax": (_softmax, vectors(), None),
    "normalised": (_normalised, vectors(), None),
    "where": (lambda h, x: jnp.where(h > x, h, jnp.sin(h)), vectors(), DIAGONAL),
    "where across": (lambda h, x: jnp.where(h[::-1] > x, h, jnp.sin(h)), vectors(), DIAGONAL),
    "clamp": (lambda h, x: jnp.clip(2 * h, -x - 1, 1.0), vectors(), DIAGONAL),
    "clamp by state": (lambda h, x: jax.lax.clamp(-jnp.abs(h[::-1]), h, x + 3.0), vectors(), ANY),
    "broadcast": (lambda h, x: h[0] * jnp.ones(6) + h, vectors(), None),
    "stop_gradient": (
        lambda h, x: jnp.tanh(h) * jnp.sum(jax.lax.stop_gradient(h)), vectors(), DIAGONAL,
    ),
    "one-hot of an index of the state": (
        lambda h, x: h * jax.nn.one_hot(jnp.argmax(h), 6), vectors(), DIAGONAL,
    ),
    "random mask": (_by_key, vectors(), DIAGONAL),
    "custom rule that couples": (lambda h, x: _coupling_rule(h) + x, vectors(),
                                 [[0, 2, 4], [1, 3, 5]]),
    "custom rule that decouples": (lambda h, x: _decoupling_rule(h) + x, vectors(), DIAGONAL),
    "custom rule": (lambda h, x: _elementwise_rule(h) + x, vectors(), DIAGONAL),
    "custom rule in a scan": (
        lambda h, x: jax.lax.scan(
            lambda c, _: (_coupling_rule(c) + x, None), h, length=2
        )[0], vectors(), ANY,
    ),
    "scan": (_scan_inside, vectors(), DIAGONAL),
    "scan that rolls": (_scan_that_rolls, vectors(), None),
    "scan over the state": (_scan_over_state, vectors(), ANY),
    "scan of length 0": (
        lambda h, x: jax.lax.scan(lambda c, y: (c + y, y), h, jnp.stack([h, h])[:0])[0], vectors(),
        ANY,
    ),
    "while": (_while_inside, vectors(), ANY),
    "while that swaps": (_while_that_swaps, vectors(), ANY),
    "while until": (_while_until, vectors(), ANY),
    "cond": (_cond_inside, vectors(), [[0, 5], [1, 4], [2, 3]]),
    "cond on the state": (_cond_on_state, vectors(), DIAGONAL),
    "jit": (lambda h, x: jax.jit(_gru)(h, x), vectors(), DIAGONAL),
    "jit in jit": (lambda h, x: jax.jit(lambda h: jax.jit(_heads_vmap)(h, x) + h)(h), vectors(),
                   [[0, 1], [2, 3], [4, 5]]),
    "checkpoint": (lambda h, x: jax.checkpoint(_gru)(h, x), vectors(), DIAGONAL),
    "checkpoint in scan": (
        lambda h, x: jax.lax.scan(
            lambda c, _: (jax.checkpoint(_gru)(c, x), None), h, length=2
        )[0], vectors(), DIAGONAL,
    ),
    "derivative inside": (lambda h, x: jax.grad(lambda h: jnp.sum(jnp.sin(h) * x))(h), vectors(),
                          DIAGONAL),
    "taken apart": (_taken_apart, jnp.zeros((2, 3)), [[0, 3], [1, 4], [2, 5]]),
    "complex": (
        lambda h, x: h * (0.3 + 0.4j) + jax.lax.complex(x, x), jnp.zeros(3, complex),
        [[0, 3], [1, 4], [2, 5]],
    ),
    "complex, real coefficient": (
        lambda h, x: jax.lax.complex(0.5 * jnp.real(h) + x, jnp.tanh(jnp.imag(h))),
        jnp.zeros(3, complex), [[0, 3], [1, 4], [2, 5]],  # real and imaginary part stay together
    ),
    "complex matrix": (
        lambda h, x: jax.lax.complex(W[:3, :3], W[3:, 3:]) @ h, jnp.zeros(3, complex), None,
    ),
    "complex and real": (
        lambda s, x: (s[0] * jax.lax.complex(s[1], x), jnp.abs(s[0])),
        (jnp.zeros(2, complex), jnp.zeros(2)), [[0, 2, 4], [1, 3, 5]],
    ),
    "conjugate": (lambda h, x: jnp.conj(h) * h, jnp.zeros(2, complex), [[0, 2], [1, 3]]),
    "bfloat16 inside": (
        lambda h, x: jnp.tanh(h.astype(jnp.bfloat16)).astype(h.dtype) + x, vectors(), DIAGONAL,
    ),
    "nothing": (lambda s, x: s, (jnp.zeros((0,)), None), DIAGONAL),
}  # fmt: skip
over_steps = pytest.mark.parametrize("name", STEPS)


def found_mask(structure, size):
    """The entries that the structure allows to be non-zero."""
    if isinstance(structure, prnn.Dense):
        return np.ones((size, size), bool)
    if isinstance(structure, prnn.Diagonal):
        return np.eye(size, dtype=bool)
    out = np.zeros((size, size), bool)
    for group in structure.groups:
        out[np.ix_(group, group)] = True
    return out


@functools.cache
def jacobian(name):
    step, state, _ = STEPS[name]
    ravel, unravel, _, _ = make_ravel(state)
    return jax.jit(jax.jacfwd(lambda v, x: ravel(step(unravel(v), x))))


@over_steps
def test_sound_and_tight(name):
    step, state, groups = STEPS[name]
    structure = prnn.detect_structure(step, state, SCALAR)
    size = sum(x.size * (1 + jnp.iscomplexobj(x)) for x in jtu.tree_leaves(state))
    structure.check(size)
    allowed = found_mask(structure, size)
    rng = np.random.default_rng(0)
    for _ in range(4):
        point, x = rng.standard_normal(size), rng.standard_normal()
        entries = np.asarray(jacobian(name)(jnp.asarray(point), jnp.asarray(x)))
        assert not np.any(entries[~allowed])
    if groups == ANY:
        return
    if groups == DIAGONAL:
        assert isinstance(structure, prnn.Diagonal)
    elif groups is None:
        assert isinstance(structure, prnn.Dense)
    else:
        assert isinstance(structure, prnn.BlockDiagonal)
        assert sorted(map(sorted, structure.groups)) == sorted(groups)


MOVES = [
    lambda h, x: jnp.roll(h, 1, axis=0),
    lambda h, x: h[::-1],
    lambda h, x: h.T.reshape(h.shape),
    lambda h, x: jnp.swapaxes(h.reshape(2, 2, 3), 0, 1).reshape(h.shape),
    lambda h, x: jnp.concatenate([h[1:2], h[:1], jnp.sin(h[2:])]),
    lambda h, x: jnp.pad(h[1:], ((0, 1), (0, 0))),
    lambda h, x: jax.lax.pad(h, 0.0, [(-1, 1, 0), (0, -2, 1)])[:, :3],
    lambda h, x: jnp.stack([h[0], h[1]] * 2) * x,
    lambda h, x: jnp.tile(h[:, :1], (1, 3)),
    lambda h, x: jax.lax.expand_dims(h[0], (0,)) * jnp.ones((4, 1)),
    lambda h, x: h * jnp.asarray([[1.0], [0.0], [1.0], [1.0]]),
]
MIXES = [
    lambda h, x: jnp.tanh(h) * x,
    lambda h, x: jnp.where(x > 0, h, jnp.cos(h)),
    lambda h, x: jnp.cumsum(h, axis=1),
    lambda h, x: jnp.cumsum(h, axis=0, dtype=h.dtype)[::-1],
    lambda h, x: jnp.sum(h, axis=1, keepdims=True) * jnp.ones((1, 3)),
    lambda h, x: jnp.max(h, axis=0, keepdims=True) + 0 * h,
    lambda h, x: jnp.einsum("ij,kj->ik", h, W[:3, :3]),
    lambda h, x: jnp.einsum("gij,gj->gi", normal(3, (4, 3, 3)), h),
    lambda h, x: jnp.einsum("ij,ik,lk->lj", h, h, h),
    lambda h, x: jax.lax.fori_loop(0, 2, lambda i, h: jnp.roll(h, 1, axis=1), h),
    lambda h, x: jax.vmap(lambda row: row * row[0])(h),
]


def _random_program(seed):
    rng = np.random.default_rng(seed)
    # Few operations each, that not everything ends up in one group.
    lines = [rng.choice(MOVES), rng.choice(MIXES), *([rng.choice(MOVES)] * (seed % 2))]

    def step(h, x):
        for line in lines:
            h = jnp.broadcast_to(line(h, x), h.shape)
        return h

    return step


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_are_seen_soundly(seed):
    step, state = _random_program(seed), jnp.zeros((4, 3))
    structure = prnn.detect_structure(step, state, SCALAR)
    true = np.zeros((12, 12), bool)
    derivative = jax.jit(jax.jacfwd(lambda v, x: step(v.reshape(4, 3), x).ravel()))
    for x in (-0.7, 0.9):
        true |= np.asarray(derivative(normal(seed, (12,)), jnp.asarray(x))) != 0
    assert not np.any(true & ~found_mask(structure, 12))


def test_only_shapes_matter():
    """The answer holds for all parameters, states and inputs, also for zeros."""
    for weights in (jnp.zeros((6, 6)), jnp.eye(6), W):
        structure = prnn.detect_structure(lambda h, x, w=weights: w @ h + x, vectors(), SCALAR)
        assert isinstance(structure, prnn.Dense)
    abstract = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pair())
    x = jax.ShapeDtypeStruct((), np.float64)
    assert prnn.detect_structure(_lstm, abstract, x) == prnn.detect_structure(_lstm, pair(), SCALAR)

    @jax.jit
    def traced(w, h):
        assert isinstance(prnn.detect_structure(lambda h, x: w @ h, h, x), prnn.Dense)
        assert isinstance(prnn.detect_structure(lambda h, x: w[0] * h, h, x), prnn.Diagonal)
        return w

    traced(W, vectors())


def test_blocks_too_uneven_to_pay_are_dense():
    """Padding to the largest group must not cost more than the full matrix."""

    def step(h, x, coupled):
        return jnp.concatenate([W[:coupled, :coupled] @ h[:coupled], h[coupled:]])

    for coupled in (2, 3, 4, 5, 6):
        structure = prnn.detect_structure(
            functools.partial(step, coupled=coupled), vectors(), SCALAR
        )
        if isinstance(structure, prnn.BlockDiagonal):
            assert len(structure.groups) * coupled**2 < 6**2
        else:
            assert isinstance(structure, prnn.Dense) and coupled > 2


def count_entries(monkeypatch):
    """Counts the stored entries of every pattern that comes out of an equation."""
    largest = [0, 0]
    original = _dependence.interpret

    def interpret(jaxpr, inputs):
        outputs = original(jaxpr, inputs)
        largest[0] += len(open_jaxpr(jaxpr)[0].eqns)
        largest[1] = max([largest[1], *(p.nnz for p in outputs if p is not None)])
        return outputs

    monkeypatch.setattr(_dependence, "interpret", interpret)
    monkeypatch.setattr("pararnn.structures._detection.interpret", interpret)
    return largest


def test_cost_of_a_large_diagonal_step(monkeypatch):
    """2048 elements: each pattern holds as many entries as there are elements, no matrix is
    filled, and each equation is looked at once."""
    size = 2048
    weights = normal(0, (3, size))

    def step(h, x):
        z, r = jax.nn.sigmoid(weights[0] * h + x), jax.nn.sigmoid(weights[1] * h - x)
        return (1 - z) * jnp.tanh(x + weights[2] * r * h) + z * h

    counted = count_entries(monkeypatch)
    assert isinstance(prnn.detect_structure(step, vectors(size), vectors(size)), prnn.Diagonal)
    equations, entries = counted
    assert entries <= size
    assert 0 < equations <= 200


def test_cost_of_a_long_loop(monkeypatch):
    """The number of turns of a loop does not matter."""
    counted = count_entries(monkeypatch)

    def step(h, x):
        return jax.lax.fori_loop(0, 100_000, lambda i, h: jnp.tanh(h + x), h)

    assert isinstance(prnn.detect_structure(step, vectors(), SCALAR), prnn.Diagonal)
    assert counted[0] <= 500


def test_dense_step_of_a_large_state():
    """A pattern too large to be worth its memory ends the analysis early, soundly."""
    size = 3000
    weights = jnp.zeros((1, 1))

    def step(h, x):
        return jnp.broadcast_to(weights, (size, size)) @ h

    assert isinstance(prnn.detect_structure(step, vectors(size), SCALAR), prnn.Dense)


def test_norm_of_a_large_state():
    """A row that would be repeated over a quarter of a million elements takes no memory."""
    size = (512, 512)
    detected = prnn.detect_structure(lambda h, x: h / jnp.sum(h) + x, vectors(size), SCALAR)
    assert isinstance(detected, prnn.Dense)


def test_wrong_rank_of_state():
    """What the step itself refuses is its own error, and names what the user wrote."""
    with pytest.raises((TypeError, ValueError)):
        prnn.detect_structure(lambda h, x: W @ h, vectors(5), SCALAR)
