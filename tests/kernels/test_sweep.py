"""Kernels of the package's cells, in all their geometries, against plain loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from sweeps import agree, both, plain_sweep, starts_like
from systems import INTERPRET

import pararnn as prnn
from pararnn.kernels import fused_sweep, unsupported
from pararnn.solvers._chunks import _with_tangents
from pararnn.solvers._tolerance import Tolerance

INPUTS, CHUNKS, STEPS = 3, 5, 4
LENGTH = CHUNKS * STEPS - 3
SIDE_BY_SIDE = {"num_steps": STEPS, "stride": STEPS, "keep": True}
CELLS = {
    "DiagonalGRU 1": (prnn.DiagonalGRU, (1,), {}),
    "DiagonalGRU 48": (prnn.DiagonalGRU, (48,), {}),
    "DiagonalGRU 64": (prnn.DiagonalGRU, (64,), {}),
    "DiagonalLSTM 3": (prnn.DiagonalLSTM, (3,), {}),
    "DiagonalLSTM 48": (prnn.DiagonalLSTM, (48,), {}),
    "MinMax 48": (prnn.MinMax, (48,), {}),
    "PiecewiseLinearRNN 3": (prnn.PiecewiseLinearRNN, (3,), {}),
    "PiecewiseLinearRNN 48": (prnn.PiecewiseLinearRNN, (48,), {}),
    "Elman 1": (prnn.Elman, (1,), {}),
    "Elman 64": (prnn.Elman, (64,), {}),
    "GRU 3": (prnn.GRU, (3,), {}),
    "GRU 48": (prnn.GRU, (48,), {}),
    "GRU 4 heads": (prnn.GRU, (64,), {"num_heads": 4}),
    "LSTM 48": (prnn.LSTM, (48,), {}),
    "LSTM 4 heads": (prnn.LSTM, (48,), {"num_heads": 4}),
    "SLSTM 3": (prnn.SLSTM, (3,), {}),
    "LRU 48": (prnn.LRU, (48,), {}),
    "M2RNN": (prnn.M2RNN, (3, 2, 4), {}),
    "DeltaNet": (prnn.DeltaNet, (2, 4, 4), {}),
    "DeltaProduct": (prnn.DeltaProduct, (2, 4, 4), {}),
    "TTTLinear": (prnn.TTTLinear, (2, 4, 4), {}),
    "Aaren": (prnn.Aaren, (2, 4, 3), {}),
    "S5 48": (prnn.S5, (48,), {}),
    "S4D": (prnn.S4D, (3,), {}),
    "RGLRU": (prnn.RGLRU, (), {}),
    "MinGRU 48": (prnn.MinGRU, (48,), {}),
    "MinLSTM 3": (prnn.MinLSTM, (3,), {}),
    "SelectiveSSM": (prnn.SelectiveSSM, (4,), {}),
    "LinearLMU": (prnn.LinearLMU, (3, 5, 7.5), {"memory_size": 2}),
    "LMU": (prnn.LMU, (3, 5, 7.5), {}),
    "GatedLinearAttention": (prnn.GatedLinearAttention, (2, 3, 4), {}),
    "Retention": (prnn.Retention, (2, 4, 3), {}),
    "Mamba2": (prnn.Mamba2, (2, 3, 4), {}),
    "Based": (prnn.Based, (2, 2, 3), {}),
    "MLSTM": (prnn.MLSTM, (2, 3, 4), {}),
}


def problem(name, dtype=np.float32, length=LENGTH):
    """A cell's step, its inputs, and starts of chunks."""
    cls, sizes, options = CELLS[name]
    xs = np.random.default_rng(1).standard_normal((length, INPUTS))

    @eqx.filter_jit  # one program instead of one for each operation
    def made(key):
        cell = cls(INPUTS, *sizes, dtype=dtype, key=key, **options)
        return cell, cell.project(jnp.asarray(xs, dtype)), cell.init_state()

    cell, us, init = made(jax.random.key(0, impl="unsafe_rbg"))  # compiles fast
    return cell.step, us, starts_like(init, CHUNKS)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    step, us, starts = problem(name)
    assert unsupported(step, starts, us) is None
    reverse = len(name) % 2 == 0  # half of them suffice for each direction
    agree(*both(step, starts, us, **SIDE_BY_SIDE, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        {"num_steps": 6, "stride": 4, "first": -2},
        {"num_steps": 9, "stride": 4, "first": -2},
        {"num_steps": 2, "stride": 4, "first": 2},
        {"num_steps": 3, "stride": 0},
        {"num_steps": 3, "stride": 0, "first": 15},
        {"num_steps": 1, "stride": 3},
    ],
    ids=str,
)
def test_rows_that_are_consumed(geometry, reverse):
    step, us, starts = problem("DiagonalLSTM 3")
    agree(*both(step, starts, us, **geometry, keep=False, reverse=reverse))


@pytest.mark.parametrize("num_steps, length", [(1, 5), (1, 4), (7, 23), (10, 23), (17, 17)])
def test_states_are_kept_where_there_are_rows(num_steps, length):
    step, us, starts = problem("DiagonalGRU 48", length=length)
    starts = starts[: -(-length // num_steps)]
    agree(*both(step, starts, us, num_steps=num_steps, stride=num_steps, keep=True))


def test_many_chunks_make_many_programs():
    step, us, _ = problem("DiagonalGRU 48", length=401)
    starts = starts_like(jnp.zeros(48, np.float32), 201)
    agree(*both(step, starts, us, num_steps=2, stride=2, keep=True))


@pytest.mark.parametrize("name", ["DiagonalGRU 48", "GRU 48"])
def test_float64(name):
    step, us, starts = problem(name, np.float64)
    agree(*both(step, starts, us, **SIDE_BY_SIDE))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_narrow_numbers(dtype):
    rng = np.random.default_rng(0)
    a, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((48,), (48, 48)))
    xs = jnp.asarray(rng.standard_normal((LENGTH, 48)), dtype)

    def step(h, x):
        return jnp.tanh(a * h + x) + 0.1 * jax.nn.sigmoid(w @ h)

    agree(*both(step, starts_like(jnp.zeros(48, dtype), CHUNKS), xs, **SIDE_BY_SIDE), units=8)


# --- tangents and cotangents --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiagonalGRU 48", "DiagonalLSTM 48", "GRU 3", "GRU 48"])
def test_tangents_are_carried(name):
    step, us, starts = problem(name)
    count = 3 if name == "GRU 3" else len(jtu.tree_leaves(starts))
    tangents = jtu.tree_map(
        lambda s: starts_like(jnp.zeros((count, *s.shape[1:]), s.dtype), CHUNKS), starts
    )
    geometry = {"num_steps": STEPS, "stride": STEPS, "keep": False}
    agree(*both(_with_tangents(step), (starts, tangents), us, **geometry))


def push(step, state, x, tangent):
    return jax.jvp(lambda s: step(s, x), (state,), (tangent,))[1]


def pull(step, state, x, cotangent):
    return jax.vjp(lambda s: step(s, x), state)[1](cotangent)[0]


@pytest.mark.parametrize("through", [push, pull])
@pytest.mark.parametrize(
    "name", ["DiagonalLSTM 3", "GRU 48", "LSTM 4 heads", "SLSTM 3", "M2RNN", "MinMax 48", "LRU 48"]
)
def test_the_linear_steps_of_derivatives(name, through):
    step, us, starts = problem(name)
    before = jtu.tree_map(lambda s: starts_like(s[0], LENGTH, 2), starts)
    offsets = jtu.tree_map(lambda s: starts_like(jnp.zeros_like(s[0]), LENGTH, 3), starts)

    def linear_step(v, inputs):
        state, x, offset = inputs
        return jtu.tree_map(jnp.add, through(step, state, x, v), offset)

    zero = jtu.tree_map(jnp.zeros_like, starts)
    inputs = (before, us, offsets)
    agree(*both(linear_step, zero, inputs, **SIDE_BY_SIDE, reverse=through is pull))


def test_disturbed_steps():
    step, us, starts = problem("DiagonalLSTM 48")
    init = jtu.tree_map(lambda s: s[0], starts)
    tolerance = Tolerance(init, None, 0.0)

    def disturbed(state, inputs):
        place, x = inputs
        return step(tolerance.disturb(state, place, jnp.ones((), jnp.float32)), x)

    inputs = (jnp.arange(LENGTH), us)
    agree(*both(disturbed, starts, inputs, num_steps=STEPS, stride=STEPS, keep=False))


# --- batches ------------------------------------------------------------------------------------


def batched(fn, w, starts, xs, axes):
    return jax.jit(jax.vmap(fn, in_axes=axes))(w, starts, xs)


@pytest.mark.parametrize(
    "axes", [(0, 0, 0), (None, 0, 0), (None, 0, None), (0, None, None), (None, None, 0)], ids=str
)
def test_batches(axes):
    rng = np.random.default_rng(0)

    def normal(axis, *shape):
        shape = shape if axis is None else (2, *shape)
        return jnp.asarray(0.3 * rng.standard_normal(shape), np.float32)

    w, starts = normal(axes[0], 48, 48), normal(axes[1], CHUNKS, 48)
    xs = normal(axes[2], LENGTH, 48)

    def fused(w, starts, xs):
        step = lambda h, x: jnp.tanh(w @ h + w[0] * x)  # noqa: E731
        return fused_sweep(step, starts, xs, interpret=INTERPRET, **SIDE_BY_SIDE)

    def plain(w, starts, xs):
        step = lambda h, x: jnp.tanh(w @ h + w[0] * x)  # noqa: E731
        return plain_sweep(step, starts, xs, **SIDE_BY_SIDE)

    agree(batched(fused, w, starts, xs, axes), batched(plain, w, starts, xs, axes))
