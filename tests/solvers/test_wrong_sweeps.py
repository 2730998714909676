"""Sweeps that do not make the steps that they should: found out, and made again."""

import dataclasses

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import error, normal, scan

import pararnn as prnn
from pararnn.sweeps import AbstractSweep, Scanned

LENGTH, CHUNK = 203, 8
XS, INIT = normal(0, (LENGTH, 3), np.float32), jnp.zeros(3, np.float32)


def step(h, x):
    return jnp.tanh(0.5 * h + x)


@dataclasses.dataclass(frozen=True)
class Lying(AbstractSweep):
    """As `Scanned`, but for the states after some steps, which are off by a thousandth.

    - `place`: after which step of a chunk; `None` for all of them.
    - `chunk`: in which chunk; `None` for all of them.
    """

    place: int | None = None
    chunk: int | None = None

    def prepare(self, xs, rows):
        return Scanned().prepare(xs, rows)

    def run(self, step, starts, inputs, rows, *, keep):
        def lying(carry, x):
            carry, place, chunk = carry
            carry = step(carry, x)
            lies = (self.place is None) | (place % CHUNK == self.place)
            lies &= (self.chunk is None) | (chunk == self.chunk)
            return jtu.tree_map(lambda h: jnp.where(lies, 1.001 * h, h), carry), place + 1, chunk

        count = rows.num_chunks
        places = jnp.full(count, rows.first % CHUNK)
        starts = starts, places, jnp.arange(count)
        ends, states = Scanned().run(lying, starts, inputs, rows, keep=keep)
        return ends[0], states and states[0]


LIES = {
    "in the first step": Lying(place=0),
    "in a step inside": Lying(place=3),
    "in the last step": Lying(place=CHUNK - 1),
    "in all steps": Lying(),
    "in the first chunk": Lying(chunk=0),
    "in a chunk": Lying(chunk=7),
}


SOLVERS = {
    "Newton": prnn.Newton(chunk_size=CHUNK),
    "ahead": prnn.Newton(chunk_size=CHUNK, min_iters=2),
    "early": prnn.Jacobi(chunk_size=CHUNK, overlap=4),
    "Sequential": prnn.Sequential(),
}


@pytest.mark.parametrize(
    "name, lie",
    [
        *(("Newton", lie) for lie in LIES),
        ("ahead", "in a step inside"),
        ("ahead", "in the first chunk"),
        ("early", "in the last step"),
        ("early", "in a chunk"),
        ("Sequential", "in a step inside"),
    ],
)
def test_a_lie_is_found(name, lie):
    solver = SOLVERS[name]
    solver = dataclasses.replace(solver, sweep_method=LIES[lie])
    solution = prnn.solve(step, XS, INIT, solver=solver)
    assert solution.stats.fallback
    assert error(solution.states, scan(step, XS, INIT)) <= 1e-6


def test_without_the_finish_a_lie_is_admitted():
    solver = prnn.Newton(chunk_size=CHUNK, sweep_method=Lying(place=3), fallback=False)
    solution = prnn.solve(step, XS, INIT, solver=solver, throw=False)
    assert solution.result == prnn.RESULTS.not_converged


def test_an_honest_sweep_is_accepted():
    """Backwards and in an uneven length, too: of the derivative."""
    solver = prnn.Newton(chunk_size=CHUNK, sweep_method=Lying(chunk=LENGTH))
    solution = prnn.solve(step, XS, INIT, solver=solver)
    assert not solution.stats.fallback
    solution = prnn.solve(step, XS, INIT, solver=prnn.Sequential(sweep_method=Lying(chunk=LENGTH)))
    assert not solution.stats.fallback
