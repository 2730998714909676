"""Trained networks: solvers know when they are done, on networks that remember for hundreds of
steps, amplify their own rounding, or track a state.

The bounds on the iterations are those after which the error no longer falls, and two more; for
Jacobi's on the GRU, half of its chunks. `python -m benchmarks trained` has more of them.
"""

import jax
import pytest
from systems import error, trained

import pararnn as prnn


def solve(name, length, solver):
    system, states, rounding = trained(name, length)
    solution = jax.jit(
        lambda xs: prnn.solve(system.step, xs, system.init, solver=solver, throw=False)
    )(system.xs)
    assert solution.result == prnn.RESULTS.successful
    # No worse than the rounding of a sequential run, several times.
    assert error(solution.states, states) <= max(4 * rounding, 1e-5)
    return solution.stats


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, length, solver, most",
    [
        ("gru", 1024, prnn.Newton(chunk_size=16), 9),
        ("gru", 1024, prnn.Jacobi(chunk_size=64), 8),
        ("elman", 1024, prnn.Jacobi(chunk_size=64), 4),
        ("elman", 512, prnn.Newton(chunk_size=64), 4),
        ("lstm", 256, prnn.Newton(chunk_size=16), 8),
        # A thousand chunks, of which each must be accepted. Of Jacobi's, less than half.
        slow("gru", 16_384, prnn.Newton(chunk_size=16), 10),
        slow("lstm", 16_384, prnn.Newton(chunk_size=16), 8),
        slow("elman", 16_384, prnn.Newton(chunk_size=16), 6),
        slow("gru", 16_384, prnn.Jacobi(), 30),
        slow("gru_early", 16_384, prnn.Jacobi(), 30),
    ],
    ids=lambda x: f"{type(x).__name__} {x.chunk_size}" if hasattr(x, "chunk_size") else str(x),
)
def test_text(name, length, solver, most):
    stats = solve(name, length, solver)
    assert int(stats.iterations) <= most
    assert not stats.fallback


def test_state_tracking():
    """All chunks of a network that tracks a group of 60 elements, not one after another."""
    stats = solve("gru_a5", 2048, prnn.Speculative(chunk_size=32, num_candidates=128))
    assert not stats.fallback
    assert int(stats.sequential_steps) <= 352
