"""Cells of each kind solved and differentiated with kernels, in both modes, against the scan; and
their second derivatives. The kernels of all cells are compared with plain sweeps elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import INTERPRET, normal

import pararnn as prnn

KEY = jax.random.key(0)
CELLS = {
    "Elman": (prnn.Elman, {"num_heads": 2}),
    "DiagonalGRU": (prnn.DiagonalGRU, {}),
    "LSTM": (prnn.LSTM, {"num_heads": 2}),
    "DiagonalLSTM": (prnn.DiagonalLSTM, {}),
    "MinMax": (prnn.MinMax, {}),
    "LRU": (prnn.LRU, {}),
    "PiecewiseLinearRNN": (prnn.PiecewiseLinearRNN, {}),
    # Small, as the kernel of its second derivatives takes long to compile.
    "LMU": (lambda *_, key: prnn.LMU(4, 1, 2, 4.5, key=key), {}),
}
# Kernels of second derivatives take long to compile, and all are made in one way from the jaxpr of
# a step: one for each kind of state, which is heads, units, units of two elements, units with an
# algebra, complex units, and two leaves that meet.
SECOND = ("Elman", "DiagonalGRU", "DiagonalLSTM", "MinMax", "LRU", "LMU")
LENGTH = 11
FUSED = prnn.sweeps.Fused(interpret=INTERPRET)
SOLVER = prnn.Newton(chunk_size=4, sweep_method=FUSED, rtol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_all_modes(name):
    make, options = CELLS[name]
    cell = make(4, 4, key=KEY, **options)
    # Not at 0, where a rectifier has no second derivative.
    init = jax.tree.map(lambda h: h + jnp.asarray(0.1, h.dtype), cell.init_state())
    us = cell.project(normal(1, (LENGTH, 4)))
    inputs = us, init
    directions = jax.tree.map(jnp.cos, inputs)

    def ours(us, init):
        options = {"structure": cell.structure, "adjoint": SOLVER, "throw": False}
        return prnn.solve(cell.step, us, init, solver=SOLVER, **options).states

    def scan(us, init):
        return jax.lax.scan(lambda h, u: (cell.step(h, u),) * 2, init, us)[1]

    def modes(states):
        def loss(us, init):
            leaves = jax.tree.leaves(states(us, init))
            return sum(jnp.sum(jnp.sin(x.real) + jnp.cos(x.imag)) for x in leaves)

        @jax.jit
        def run(inputs, directions):
            gradient = jax.grad(loss, argnums=(0, 1))
            first = jax.jvp(states, inputs, directions), gradient(*inputs)
            return first, jax.jvp(gradient, inputs, directions)[1] if name in SECOND else None

        return run(inputs, directions)

    got, expected = modes(ours), modes(scan)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
