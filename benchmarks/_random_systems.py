"""Seeded random recurrences under random solvers: is a wrong answer ever silent?

*Right* means that every returned state is the step of the one before it, and, for a system that
forgets, that the states equal those of the sequential run, within what the system makes of a
tolerance; each element of the state by its own scale. So are states that equal those of the
sequential run to that tolerance, whatever the steps make of their last digits. A system that does
not forget has many trajectories that rounding admits, of which the sequential run is only one. A
report that admits defeat is no failure either.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import pararnn as prnn
from pararnn._misc import previous_states

from ._hostile import AXIS, FAMILIES, SIZE, Family

GAINS = (0.3, 0.9, 1.2, 2.0, 5.0, 30.0)
LENGTHS = (0, 1, 2, 17, 100, 515, 3000)
CHUNKS = (1, 3, 16, 64, 5000, None)
# Systems that share a family, a length, a dtype, resets and a solver, hence a compiled program.
GROUP = 40
# A system forgets if it makes less than this, relative to its states, of a tolerance.
FORGETS = 0.01
VERDICTS = ("right", "admitted", "SILENT")


def _solver(rng: np.random.Generator, family: Family) -> prnn.AbstractSolver | None:
    """Any that such steps can have."""
    if family.exchanges:
        return None
    chunk_size = CHUNKS[rng.integers(len(CHUNKS))]
    overlap = None if chunk_size is None else min(8, chunk_size)
    options: dict[str, Any] = {"chunk_size": chunk_size}
    solvers = [
        prnn.Sequential(),
        prnn.Newton(**options),
        prnn.Newton(**options, linear_method=prnn.scans.Associative()),
        prnn.Newton(**options, linear_method=prnn.scans.Radix(), min_iters=2),
        prnn.Newton(**options, overlap=overlap),
        prnn.QuasiNewton(**options),
        prnn.Jacobi(**options),
        prnn.Jacobi(**options, overlap=overlap),
        prnn.Picard(**options),
        prnn.LevenbergMarquardt(**options),
        prnn.Speculative(chunk_size=16 if chunk_size is None else chunk_size, num_candidates=4),
    ]
    if family.affine:
        solvers += [prnn.AssociativeScan()] * 5
    return solvers[rng.integers(len(solvers))]


# --- one program for the systems of a group -------------------------------------------------------


def _wide(tree: Any) -> Any:
    return jtu.tree_map(lambda x: x.astype(jnp.float64), tree)


def _scale(states: Any, init: Any) -> Any:
    """The largest magnitude of each element of the state."""
    return jtu.tree_map(
        lambda hs, h: jnp.maximum(jnp.max(jnp.abs(hs), axis=0, initial=0), jnp.abs(h)),
        _wide(states),
        _wide(init),
    )


def _error(got: Any, expected: Any, scale: Any) -> Any:
    """By leaf, the largest difference of any element in its own scale."""

    def one(a, b, scale):
        difference = jnp.where(a == b, 0, jnp.abs(a - b))  # infinities may be equal
        return jnp.max(difference / jnp.maximum(jnp.expand_dims(scale, 0), 1e-300), initial=0)

    return jtu.tree_map(one, _wide(got), _wide(expected), scale)


def _program(family: Family, solver: prnn.AbstractSolver | None):
    """One compiled function of `(w, xs, init, reset)` for a batch of systems.

    It returns, for each: whether the solve calls itself successful, whether it finished
    sequentially; by leaf the errors and the defects; and the condition, by how much errors of
    random signs, one in each step, grow together: the largest tangent of `v' = J v + e` with
    `e = ±1` in the scale of the element.
    """

    def one(w, xs, init, reset):
        bound = functools.partial(family.step, w)
        solution = prnn.solve(
            bound,
            xs,
            init,
            solver=solver,
            reset=reset,
            reset_state=jtu.tree_map(lambda h: 0 * h, init),
            throw=False,
        )

        def anew(h, flag):
            return jtu.tree_map(lambda x: jnp.where(flag, 0 * x, x), h)

        def step(h, inputs):
            x, flag = inputs
            return bound(anew(h, flag), x)

        with jax.default_matmul_precision("highest"):
            expected = jax.lax.scan(lambda h, u: (step(h, u),) * 2, init, (xs, reset))[1]
            before = jtu.tree_map(lambda h: h[: len(xs)], previous_states(init, solution.states))
            images = jax.vmap(step)(before, (xs, reset))
            scale = _scale(expected, init)
            condition = _condition(step, (xs, reset), init, scale)
        errors, defects = (_error(solution.states, x, scale) for x in (expected, images))
        successful = solution.result == prnn.RESULTS.successful
        return successful, solution.stats.fallback, errors, defects, condition

    return jax.jit(jax.vmap(one, axis_name=AXIS if family.exchanges else None))


def _condition(step, inputs, init, scale):
    # In one wide dtype: what is asked for is the system's, not that of the rounding.
    scale = jtu.tree_map(lambda s: jnp.maximum(s, 1e-300), scale)
    keys = jax.random.split(jax.random.key(0), len(inputs[0]))

    def body(carry, u):
        state, tangents = carry
        key, u = u
        state, push = jax.linearize(lambda h: step(h, u), state)

        def pushed(v, key):
            v = push(jtu.tree_map(lambda t, h, s: (t * s).astype(h.dtype), v, state, scale))
            leaves, treedef = jtu.tree_flatten(v)
            noise = [
                jax.random.rademacher(k, t.shape, jnp.float64)
                for k, t in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
            ]
            noise = jtu.tree_unflatten(treedef, noise)
            return jtu.tree_map(
                lambda t, s, n: jnp.clip(t.astype(jnp.float64) / s + n, -1e30, 1e30),
                v,
                scale,
                noise,
            )

        tangents = jax.vmap(pushed)(tangents, jax.random.split(key, 4))
        largest = [jnp.max(jnp.abs(t)) for t in jtu.tree_leaves(tangents)]
        return (state, tangents), jnp.max(jnp.stack(largest))

    zero = jtu.tree_map(lambda s: jnp.zeros((4, *s.shape)), scale)
    sizes = jax.lax.scan(body, (init, zero), (keys, inputs))[1]
    return jnp.max(sizes, initial=1.0)


# --- what becomes of them -------------------------------------------------------------------------


def group(number: int, seed: int = 0, size: int = GROUP) -> Iterator[dict[str, Any]]:
    """One row per system of a group, whose `verdict` is one of `VERDICTS`. Groups are independent
    of each other, so that they can be made in any order."""
    rng = np.random.default_rng([seed, number])
    name, length = str(rng.choice(list(FAMILIES))), int(rng.choice(LENGTHS))
    family = FAMILIES[name]
    dtype = np.dtype(rng.choice(["float32", "float64"]))
    solver, with_resets = _solver(rng, family), bool(rng.random() < 0.3)
    gains = np.resize(GAINS, size)
    w = rng.standard_normal((size, 3, SIZE, SIZE)) * np.expand_dims(gains, (1, 2, 3)) / SIZE**0.5
    xs, h = rng.standard_normal((size, length, SIZE)), rng.standard_normal((size, SIZE))
    reset = (rng.random((size, length)) < 0.05) & with_resets
    w, xs, h = (jnp.asarray(x, dtype) for x in (w, xs, h))
    init = jax.vmap(family.init)(h)
    found = jax.device_get(_program(family, solver)(w, xs, init, jnp.asarray(reset)))
    # A state is as exact as its narrowest array, on which the others depend.
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(init))
    for i, gain in enumerate(gains):
        successful, fallback, errors, defects, condition = jtu.tree_map(lambda x, i=i: x[i], found)
        error, defect = (max(jtu.tree_leaves(x)) for x in (errors, defects))
        tolerance = eps**0.8 * float(condition)
        # A chunk's start may be off the end before it by the tolerance; in a sequential run too,
        # products with large weights are rounded.
        allowed = 2 * eps**0.8 + 8 * eps * max(1.0, gain)
        forgets = tolerance <= FORGETS
        # Steps that stretch, or sums of large terms that cancel, make more of a last digit; whose
        # states are those of the sequential run is right all the same.
        right = error <= allowed or (defect <= allowed and (not forgets or error <= 3 * tolerance))
        yield {
            "family": name,
            "gain": float(gain),
            "L": length,
            "dtype": dtype.name,
            "resets": with_resets,
            "solver": repr(solver),
            "condition": float(condition),
            "finished sequentially": bool(fallback),
            "error": float(error),
            "defect": float(defect),
            "forgets": bool(forgets),
            "verdict": ("right" if right else "SILENT") if successful else "admitted",
        }
