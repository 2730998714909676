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
from pararnn.cells._based import _features
from pararnn.cells._chunks_decayed import LOG_ZERO, summed_logs, through_channels, through_heads

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
    rng = np.random.default_rng(3)
    return jtu.tree_map(lambda h: jnp.asarray(rng.standard_normal(h.shape), h.dtype), cell_state(cell))


def cell_state(cell):
    return cell.init_state()


def by_steps(arguments, reset):
    """The outputs and the last state by one scan of the step, which starts anew where told to."""
    cell, xs, state = arguments
    us = cell.project(xs)

    def step(h, inputs):
        u, anew = inputs
        h = jtu.tree_map(lambda a, b: jnp.where(anew, a, b), cell.init_state(), h)
        h = cell.step(h, u)
        return h, h

    final, states = jax.lax.scan(step, state, (us, reset))
    return cell.readout(states, us), final


def by_chunks(arguments, reset):
    cell, xs, state = arguments
    return prnn.RNN(cell)(xs, state, reset=reset, throw=False)


def loss(run):
    """Of outputs and last state, each by itself in its own dtype."""

    def value(arguments, reset):
        leaves = jtu.tree_leaves(result := run(arguments, reset))
        waves = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)) for x in leaves]
        return sum(jnp.vdot(w, jnp.tanh(x.ravel())) for w, x in zip(waves, leaves, strict=True)), result

    return eqx.filter_jit(eqx.filter_value_and_grad(value, has_aux=True))


def agree(got, expected, tol):
    got, expected = (jtu.tree_leaves(eqx.filter(t, eqx.is_array)) for t in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * scale)
