"""Seeded random recurrences under random solvers: is a wrong answer ever silent?

*Right* means that every returned state is the step of the one before it, and, for a system that
forgets, that the states equal those of the sequential run, within what the system makes of a
tolerance. A system that does not forget has many trajectories that rounding admits, of which the
sequential run is only one. A report that admits defeat is no failure either.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import pararnn as prnn
from pararnn.diagnostics import previous_states, relative_error

SIZE = 6
GAINS = (0.3, 0.9, 1.2, 2.0, 5.0, 30.0)
LENGTHS = (0, 1, 2, 17, 100, 515, 3000)
CHUNKS = (1, 3, 16, 64, 5000, None)
# A system forgets if it makes less than this, relative to its states, of a tolerance.
FORGETS = 0.01


def _elman(w, h, x):
    return jnp.tanh(w[0] @ h + x)


def _gru(w, h, x):
    z, r = jax.nn.sigmoid(w[0] @ h + x), jax.nn.sigmoid(w[1] @ h - x)
    return (1 - z) * jnp.tanh(w[2] @ (r * h) + x) + z * h


def _diagonal_gru(w, h, x):
    a, b, c = (jnp.diag(m) for m in w)
    z, r = jax.nn.sigmoid(a * h + x), jax.nn.sigmoid(b * h - x)
    return (1 - z) * jnp.tanh(c * r * h + x) + z * h


def _lstm(w, state, x):
    c, h = jnp.split(state, 2)
    f, i = jax.nn.sigmoid(w[0][:3, :3] @ h + x[:3]), jax.nn.sigmoid(w[1][:3, :3] @ h + x[3:])
    c = f * c + i * jnp.tanh(w[2][:3, :3] @ h + x[:3])
    return jnp.concatenate([c, jnp.tanh(c)])


def _sine(w, h, x):
    return jnp.sin(jnp.diag(w[0]) * 2 * h + x)


CELLS = {"Elman": _elman, "GRU": _gru, "diagonal GRU": _diagonal_gru, "LSTM": _lstm, "sine": _sine}


def _methods(chunk_size: int | None) -> list[prnn.AbstractSolver]:
    speculative_chunk = 16 if chunk_size is None else chunk_size
    return [
        prnn.Newton(chunk_size=chunk_size),
        prnn.Newton(chunk_size=chunk_size, linear_method="associative"),
        prnn.QuasiNewton(chunk_size=chunk_size),
        prnn.Jacobi(chunk_size=chunk_size),
        prnn.Picard(chunk_size=chunk_size),
        prnn.LevenbergMarquardt(chunk_size=chunk_size),
        prnn.Speculative(chunk_size=speculative_chunk, num_candidates=4),
    ]


def _program(step, solver):
    """One compiled `(weights, xs, init) -> (successful, fallback, states, the scan's states, images
    of the states, condition)` for all weights.

    The condition is by how much errors of random signs, one in each step, grow together: the
    largest tangent of `v' = J v + e` with `e = ±1`.
    """

    @jax.jit
    def run(weights, xs, init):
        bound = functools.partial(step, weights)

        def body(carry, inputs):
            x, errors = inputs
            state, tangents = carry
            state, push = jax.linearize(lambda h: bound(h, x), state)
            tangents = jnp.clip(jax.vmap(push)(tangents) + errors, -1e30, 1e30)
            return (state, tangents), (state, jnp.max(jnp.abs(tangents)))

        solution = prnn.solve(bound, xs, init, solver=solver, throw=False)
        before = previous_states(init, solution.states)[: len(xs)]
        errors = jax.random.rademacher(jax.random.key(0), (len(xs), 4, init.size), init.dtype)
        with jax.default_matmul_precision("highest"):
            images = jax.vmap(bound)(before, xs)
            start = init, jnp.zeros((4, init.size), init.dtype)
            _, (expected, sizes) = jax.lax.scan(body, start, (xs, errors))
        condition = jnp.max(sizes, initial=1.0)
        successful = solution.result == prnn.RESULTS.successful
        return successful, solution.stats.fallback, solution.states, expected, images, condition

    return run


def random_systems(count: int, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """One row per system, whose `verdict` is `right`, `admitted` or `SILENT`.

    Every six systems share cell, length, dtype and solver, hence one compiled program, and differ
    in gain, weights, inputs and initial state.
    """
    rng = np.random.default_rng(seed)
    rows = []
    bar = tqdm(total=count, desc="random systems", disable=not progress)
    while len(rows) < count:
        cell, length = str(rng.choice(list(CELLS))), int(rng.choice(LENGTHS))
        dtype = np.dtype(rng.choice(["float32", "float64"]))
        chunk_size = CHUNKS[rng.integers(len(CHUNKS))]
        methods = _methods(chunk_size)
        solver = methods[rng.integers(len(methods))]
        run = _program(CELLS[cell], solver)
        eps = float(jnp.finfo(dtype).eps)
        for gain in GAINS[: count - len(rows)]:
            weights = rng.standard_normal((3, SIZE, SIZE)) * gain / SIZE**0.5
            xs, init = rng.standard_normal((length, SIZE)), rng.standard_normal(SIZE)
            inputs = (jnp.asarray(x, dtype) for x in (weights, xs, init))
            successful, fallback, states, expected, images, condition = run(*inputs)
            tolerance = eps**0.8 * float(condition)
            error = relative_error(states, expected)
            defect = relative_error(states, images)
            # A chunk's start may be off the end before it by the tolerance, `eps ** 0.8`; in a
            # sequential run too, products with large weights are rounded.
            is_trajectory = defect <= 2 * eps**0.8 + 8 * eps * max(1.0, gain)
            right = is_trajectory and (tolerance > FORGETS or error <= 3 * tolerance)
            rows.append(
                {
                    "cell": cell,
                    "gain": gain,
                    "L": length,
                    "dtype": dtype.name,
                    "solver": repr(solver),
                    "condition": float(condition),
                    "finished sequentially": bool(fallback),
                    "error": error,
                    "defect": defect,
                    "forgets": tolerance <= FORGETS,
                    "verdict": ("right" if right else "SILENT") if successful else "admitted",
                }
            )
            bar.update()
    bar.close()
    return rows
