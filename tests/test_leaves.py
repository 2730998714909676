"""Derivatives where not everything takes part: a loss that reads one leaf of the state only, leaves
that depend on nothing that is differentiated, leaves that are not there."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import error, normal, scan

import pararnn as prnn

LENGTH = 5
ADJOINTS: dict[str, prnn.AbstractSolver | prnn.ClippedAdjoint | None] = {
    "default": None,
    "Sequential": prnn.Sequential(),
    "Newton": prnn.Newton(),
    "Jacobi": prnn.Jacobi(chunk_size=2),
    "AssociativeScan": prnn.AssociativeScan(),
    # So large a limit that nothing is clipped: the true gradient.
    "clipped, Sequential": prnn.ClippedAdjoint(1e9),
    "clipped, Newton": prnn.ClippedAdjoint(1e9, prnn.Newton()),
}


def _cell(make, *args, **kwargs):
    return lambda: make(*args, **kwargs, key=jax.random.key(0))


CELLS = {
    "Elman": _cell(prnn.Elman, 2, 2),
    "GRU": _cell(prnn.GRU, 2, 2),
    "DiagonalGRU": _cell(prnn.DiagonalGRU, 2, 2),
    "LSTM": _cell(prnn.LSTM, 2, 2),
    "DiagonalLSTM": _cell(prnn.DiagonalLSTM, 2, 2),
    "SLSTM": _cell(prnn.SLSTM, 2, 2),
    "MinMax": _cell(prnn.MinMax, 2, 2),
    "M2RNN": _cell(prnn.M2RNN, 2, 1, 2, 2),
    "PiecewiseLinearRNN": _cell(prnn.PiecewiseLinearRNN, 2, 2),
    "LRU": _cell(prnn.LRU, 2, 2),
    "DeltaNet": _cell(prnn.DeltaNet, 2, 1, 2, 2),
    "DeltaProduct": _cell(prnn.DeltaProduct, 2, 1, 2, 2),
    "TTTLinear": _cell(prnn.TTTLinear, 2, 1, 2, 2),
    "Aaren": _cell(prnn.Aaren, 2, 1, 2, 2),
    "S5": _cell(prnn.S5, 2, 2),
    "S4D": _cell(prnn.S4D, 2, 1),
    "RGLRU": _cell(prnn.RGLRU, 2),
    "MinGRU": _cell(prnn.MinGRU, 2, 2),
    "MinLSTM": _cell(prnn.MinLSTM, 2, 2),
    "SelectiveSSM": _cell(prnn.SelectiveSSM, 2, 1),
    "LinearLMU": _cell(prnn.LinearLMU, 2, 2, 2, 3.0),
    "LMU": _cell(prnn.LMU, 2, 2, 2, 3.0),
    "PLSTM": _cell(prnn.PLSTM, 2, 1, 2, 2),
    "Titans": _cell(prnn.Titans, 2, 1, 1, 2),
    "TitansChunked": _cell(prnn.TitansChunked, 2, 1, 1, 2, chunk_length=2),
    "ConvLSTM": _cell(prnn.ConvLSTM, 2, 1, (1, 2)),
    "ConvS5": _cell(prnn.ConvS5, 2, 1, (1, 2)),
    "GatedLinearAttention": _cell(prnn.GatedLinearAttention, 2, 1, 2, 2, gate_rank=1),
    "Retention": _cell(prnn.Retention, 2, 1, 2, 1),
    "Mamba2": _cell(prnn.Mamba2, 2, 1, 2, 2),
    "Based": _cell(prnn.Based, 2, 1, 1, 1),
    "MLSTM": _cell(prnn.MLSTM, 2, 1, 2, 2),
    "EquinoxGRU": lambda: prnn.from_equinox(eqx.nn.GRUCell(2, 2, key=jax.random.key(0))),
    "EquinoxLSTM": lambda: prnn.from_equinox(eqx.nn.LSTMCell(2, 2, key=jax.random.key(0))),
}


def one_leaf_gradients(run, leaves, differentiable):
    """The gradients of losses that read but one of these leaves of the states, in one program."""

    def loss(differentiable, index):
        leaf = jtu.tree_leaves(run(differentiable))[index]
        parts = (leaf.real, 2 * leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
        parts = jnp.concatenate(parts).astype(float)
        return jnp.sum(jnp.cos(jnp.arange(float(parts.size))).reshape(parts.shape) * jnp.sin(parts))

    return [eqx.filter_grad(functools.partial(loss, index=i))(differentiable) for i in leaves]


@functools.cache
def cell_and_gradients(name):
    """A cell, what enters its recurrence, and the gradients by differentiating the scan."""
    cell = CELLS[name]()
    shape = (2, *getattr(cell, "image_shape", ()))
    us = cell.project(normal(0, (LENGTH, *shape)))
    init = jtu.tree_map(lambda h: h + 0.1, cell.init_state())

    leaves = range(len(jtu.tree_leaves(init)))

    @eqx.filter_jit
    def expected(arguments):
        return one_leaf_gradients(lambda a: scan(a[0].step, a[1], a[2]), leaves, arguments)

    return leaves, (cell, us, init), expected((cell, us, init))


# The adjoint that is chosen, with each cell; a state of one array meets Newton's in
# `cells/test_cells.py`. Others know arrays but not cells: each with units of two elements, and with
# arrays of different shapes.
SEVERAL = ("LSTM", "DiagonalLSTM", "SLSTM", "MLSTM", "LMU", "ConvLSTM", "Aaren", "EquinoxLSTM")
MANY = ("Titans", "TitansChunked")
WITH_ALL = ("DiagonalLSTM", "LMU")
TABLE = [
    (cell, adjoint)
    for cell in CELLS
    for adjoint in ADJOINTS
    if cell in WITH_ALL
    or adjoint == "default"
    or (adjoint == "Newton" and cell in (*SEVERAL, *MANY, "EquinoxGRU"))
]


@pytest.mark.parametrize("name, adjoint", TABLE, ids=[" with ".join(case) for case in TABLE])
def test_loss_that_reads_one_leaf(name, adjoint):
    """With respect to parameters, inputs and the initial state."""
    adjoint = ADJOINTS[adjoint]
    leaves, arguments, expected = cell_and_gradients(name)

    @eqx.filter_jit
    def gradients(arguments):
        def run(arguments):
            cell, us, init = arguments
            # What raises is not kept from one run of the tests to the next.
            throw = adjoint is None
            return prnn.solve(cell.step, us, init, adjoint=adjoint, throw=throw).states

        return one_leaf_gradients(run, leaves, arguments)

    assert error(gradients(arguments), expected) <= 1e-9


def test_table_has_every_cell_of_the_package():
    concrete = {
        cell
        for cell in vars(prnn.cells).values()
        if isinstance(cell, type)
        and issubclass(cell, prnn.AbstractCell)
        and not cell.__name__.startswith("Abstract")
    }
    assert {type(make()) for make in CELLS.values()} == concrete
    several = {name for name in CELLS if len(jtu.tree_leaves(CELLS[name]().init_state())) > 1}
    assert several == {*SEVERAL, *MANY}


# --- states that hold more than what is differentiated --------------------------------------------


def _delay(w, state, x):
    """A delay line of two steps, a clock, weights that are kept and a leaf that is not there."""
    h = jnp.tanh(state["kept"] * state["late"][1] + w * x["u"])
    return {
        "late": (h, state["late"][0]),
        "clock": state["clock"] + 1,
        "kept": state["kept"],
        "nothing": None,
    }


def _oscillator(w, state, x):
    """Complex, with a delay; inputs that have no derivative; a leaf of size 0."""
    z, before, empty = state
    noise = jax.random.normal(x["key"], before.shape)
    turned = jnp.where(x["flag"], before, jnp.conj(z))
    noise = 0.1 * jax.lax.complex(noise, -noise)
    new = 0.5j * turned + w[x["token"]] * z / (1 + z * jnp.conj(z)) + noise
    return new, z, empty


@jax.custom_jvp
def _straight_through(h):
    return jnp.round(4 * h) / 4


_straight_through.defjvps(lambda t, ans, h: 0.9 * t)


def _mixed(w, state, x):
    """Two widths, a leaf that nothing flows to, a rule of its own for the derivative."""
    wide, narrow, stopped = state
    h = w * _straight_through(wide) + x["u"] + narrow.astype(wide.dtype)
    return jnp.sin(h), (0.5 * wide).astype(narrow.dtype), jax.lax.stop_gradient(h + stopped)


def _case(step, w, init):
    rng = np.random.default_rng(0)
    xs = {
        "u": normal(1, (LENGTH, 2)),
        "token": jnp.asarray(rng.integers(0, 3, LENGTH)),
        "flag": jnp.asarray(rng.random(LENGTH) < 0.5),
        "key": jax.random.split(jax.random.key(0), LENGTH),
    }
    return step, w, xs, init


STATES = {
    "delay": lambda: _case(
        _delay,
        jnp.asarray([0.7, -0.4]),
        {
            "late": (normal(2, (2,)), normal(3, (2,))),
            "clock": jnp.zeros(()),
            "kept": jnp.asarray([0.5, 0.9]),
            "nothing": None,
        },
    ),
    "oscillator": lambda: _case(
        _oscillator,
        jnp.asarray([[0.3 + 0.2j, 0.1], [0.4j, 0.5], [0.2, -0.3]]),
        (jnp.asarray([1 + 1j, 0.5]), jnp.asarray([0.1, -0.2j]), jnp.zeros((0, 2))),
    ),
    "mixed": lambda: _case(
        _mixed,
        jnp.asarray([0.6, -0.3]),
        (normal(4, (2,)), normal(5, (2,), np.float32), jnp.zeros(2)),
    ),
}
RESET = np.asarray([False, False, True, False, False])
MASK = np.asarray([True, True, True, False, True])


@functools.cache
def state_and_gradients(name, extras):
    """The problem, and its gradients by differentiating the scan."""
    step, *arguments = STATES[name]()

    def run(arguments):
        w, xs, init = arguments

        def body(state, inputs):
            x, reset, mask = inputs
            if extras:
                start = jtu.tree_map(lambda a, b: jnp.where(reset, a, b), init, state)
                new = step(w, start, x)
                new = jtu.tree_map(lambda a, b: jnp.where(mask, a, b), new, state)
            else:
                new = step(w, state, x)
            return new, new

        return jax.lax.scan(body, init, (xs, jnp.asarray(RESET), jnp.asarray(MASK)))[1]

    @eqx.filter_jit
    def expected(arguments):
        return one_leaf_gradients(run, (0, -1), arguments)

    return step, tuple(arguments), expected(tuple(arguments))


@pytest.mark.parametrize(
    "name, adjoint, extras",
    [
        *(("delay", adjoint, False) for adjoint in ADJOINTS if adjoint != "Sequential"),
        ("delay", "Newton", True),
        ("oscillator", "default", True),
        ("oscillator", "Newton", False),
        ("oscillator", "clipped, Sequential", True),
        ("mixed", "default", False),
        ("mixed", "Newton", True),
        ("mixed", "clipped, Sequential", False),
    ],
)
def test_states_that_hold_more(name, adjoint, extras):
    """Plain, or (`extras`) with a restart and with padding."""
    adjoint = ADJOINTS[adjoint]
    step, arguments, expected = state_and_gradients(name, extras)
    options = {"reset": RESET, "mask": MASK} if extras else {}

    @eqx.filter_jit
    def gradients(arguments):
        def run(arguments):
            w, xs, init = arguments
            bound = functools.partial(step, w)
            return prnn.solve(bound, xs, init, adjoint=adjoint, **options).states

        return one_leaf_gradients(run, (0, -1), arguments)

    assert error(gradients(arguments), expected) <= (1e-6 if name == "mixed" else 1e-9)
