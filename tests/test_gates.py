"""What `python -m benchmarks trained` says of gates and derivatives."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from benchmarks import _gates
from benchmarks._systems import of_cell, sequential
from pararnn.jaxprs._elementwise import elementwise_tangents

AFTER = (1, 3, 4)


def small(cell, length=12):
    return of_cell(cell, jax.random.normal(jax.random.key(1), (length, cell.input_size)))


def test_products_are_those_of_the_jacobians():
    system = small(prnn.LSTM(3, 2, key=jax.random.key(0)))
    states = sequential(system)
    got = _gates.products(system.step, system, states, 5, AFTER)
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda h: h[5], states))

    def run(vector, steps):
        state = jax.tree.unflatten(treedef, jnp.split(vector, len(leaves)))
        for t in range(6, 6 + steps):
            state = system.step(state, jax.tree.map(operator.itemgetter(t), system.xs))
        return jnp.concatenate(jax.tree.leaves(state))

    start = jnp.concatenate(leaves)
    expected = [jax.jacrev(run)(start, steps).T for steps in AFTER]
    np.testing.assert_allclose(got, jnp.stack(expected), rtol=1e-10, atol=1e-14)


def test_what_gates_miss_is_what_the_weights_carry():
    """Without recurrent weights, nothing; without gates, all."""
    gru = prnn.GRU(3, 4, key=jax.random.key(0))
    gated = small(eqx.tree_at(lambda c: c.weight_h, gru, jnp.zeros_like(gru.weight_h)))
    left, missed, values = _gates._products(gated, sequential(gated), 5, AFTER)
    assert np.all(missed == 0) and np.all(left > 0)
    # The Jacobian is diagonal: its squared singular values are the squares that are left.
    np.testing.assert_allclose(np.mean(values**2, axis=1), left, rtol=1e-10)
    elman = small(prnn.Elman(3, 4, key=jax.random.key(0)))
    left, missed, _ = _gates._products(elman, sequential(elman), 5, AFTER)
    np.testing.assert_array_equal(left, missed)
    part = _gates.products(elementwise_tangents(elman.step), elman, sequential(elman), 5, AFTER)
    assert not np.any(part)


@pytest.mark.slow
def test_iterations_of_a_derivative():
    """An Elman network forgets within some tens of steps: few sweeps of chunks, forwards and
    backwards, with the errors of a float32 scan."""
    row = _gates.sweeps("elman", 256, prnn.ElementwiseNewton(chunk_size=32))
    assert 2 <= row["iterations"] <= 5 and 2 <= row["derivative"] <= 5
    assert not row["finished sequentially"] and not row["derivative finished sequentially"]
    assert row["error"] < 4 * row["error of the scan"]
    assert row["error of the derivative"] < 4 * row["error of the scan's derivative"]
    newton = _gates.sweeps("elman", 256, prnn.Newton(chunk_size=32))
    assert newton["derivative"] == 1
