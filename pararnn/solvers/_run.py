"""One entry for every solver, so that no caller needs to tell them apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._devices import typed_slice
from .._misc import num_steps, raveler
from .._solution import Stats
from .._structure import AbstractStructure
from .._traits import check_tangents
from ._base import AbstractIterativeSolver, AbstractSolver
from ._exact import AssociativeScan, associative_scan
from ._newton import Newton
from ._sequential import Sequential
from ._shooting import linear_shooting, multiple_shooting


def _scan(step, xs, init):
    def body(state, x):
        state = step(state, x)
        return state, state

    return jax.lax.scan(body, init, xs)[1]


def run(
    solver: AbstractSolver,
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    guess: PyTree[Array] | None,
    structure: AbstractStructure | None,
    report: Callable[[int, float, int, int], Any] | None = None,
) -> tuple[PyTree[Array], Bool[Array, ""], Stats]:
    """All states of a recurrence of at least one step; whether they converged; what happened.

    `structure` may be `None` for `Sequential`. `report` is called in every iteration.
    """
    if isinstance(solver, Sequential):
        length = num_steps(xs)
        stats = Stats(
            iterations=jnp.asarray(0),
            correction=jnp.zeros((), jnp.float32),
            chunk_size=length,
            sequential_steps=jnp.asarray(length),
            fallback=jnp.asarray(False),
        )
        return _scan(step, xs, init), jnp.asarray(True), stats
    assert structure is not None
    if isinstance(solver, AssociativeScan):
        return associative_scan(step, xs, init, solver=solver, structure=structure, report=report)
    assert isinstance(solver, AbstractIterativeSolver)
    if solver.linearization(structure, raveler(init)[2]).propagated is not None:
        check_tangents(solver, step, init, typed_slice(xs))
    return multiple_shooting(
        step, xs, init, guess, solver=solver, structure=structure, report=report
    )


def run_linear(
    solver: AbstractSolver,
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    structure: AbstractStructure | None,
) -> PyTree[Array]:
    """As `run` for a step that is affine in the state. Always ends with the exact solution."""
    if isinstance(solver, Sequential):
        return _scan(step, xs, init)
    if isinstance(solver, AssociativeScan):
        solver = Newton(chunk_size=1, linear_method=solver.linear_method)
    assert isinstance(solver, AbstractIterativeSolver) and structure is not None
    return linear_shooting(step, xs, init, solver=solver, structure=structure)
