"""What `benchmarks gpu` asks: cells, lengths and solvers, and the functions to compile for each."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import pararnn as prnn

from . import _cases
from ._cases import NO_KERNELS, scanned, solved

SCAN, CHOICE = "lax.scan", "choice"
PLATFORM = "cuda"
KINDS = ("forward", "gradient")

# From a size to a cell whose inputs have as many features.
CELLS: dict[str, Callable[..., prnn.AbstractCell]] = {
    "DiagonalGRU": lambda size, **kw: prnn.DiagonalGRU(size, size, **kw),
    "DiagonalLSTM": lambda size, **kw: prnn.DiagonalLSTM(size, size, **kw),
    "GRU, forgets": _cases.VARIANTS["GRU, forgets"],
    "M2RNN, 4 heads": _cases.VARIANTS["M2RNN, 4 heads"],
}


class Case(NamedTuple):
    """One sequence in float32, and how it is solved: forward, and forward and gradient.

    - `cell`, `size`, `length`: a key of `CELLS`, the size that it is made with, the steps.
    - `solver`: see `settings`.
    - `kinds`: which of `KINDS` are asked for.
    - `observed`: the length at which the turns of the loops are observed, by the same solver, where
        a machine without a GPU has too little memory for `length`; `None` is that.
    """

    cell: str
    size: int
    length: int
    solver: str
    kinds: tuple[str, ...] = KINDS
    observed: int | None = None

    def key(self) -> str:
        return f"{self.cell} D={self.size} L={self.length} {self.solver}"


class Problem(NamedTuple):
    """The recurrence alone: a cell and what it makes of random inputs `xs`."""

    cell: prnn.AbstractCell
    xs: Any
    inputs: Any


def problem(case: Case) -> Problem:
    """Seeded weights and inputs."""
    key_cell, key_x = jax.random.split(jax.random.key(0))
    cell = CELLS[case.cell](case.size, dtype=jnp.float32, key=key_cell)
    xs = jax.random.normal(key_x, (case.length, case.size), jnp.float32)
    return Problem(cell, xs, eqx.filter_jit(lambda cell, xs: cell.project(xs))(cell, xs))


def settings(text: str, problem: Problem) -> tuple[Any, Any] | None:
    """The solver and the adjoint that a text stands for, complete, as a GPU would have them.

    `lax.scan` is the plain scan: `None`. `choice` is what the package chooses there, others are as
    for `benchmarks speed`.
    """
    if text == SCAN:
        return None
    text = text.replace(CHOICE, "default")
    return _cases.settings(text, problem.cell, problem.xs, PLATFORM)


class Program(NamedTuple):
    """A function and its arguments, all of them arrays."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def programs(case: Case, problem: Problem, chosen: tuple[Any, Any] | None) -> dict[str, Program]:
    """By kind: the states; and the value and the gradient of a sum of their squares with random
    weights, with respect to parameters and inputs."""
    arrays, static = eqx.partition(problem.cell, eqx.is_array)

    def forward(arrays: Any, inputs: Any) -> Any:
        return _solution(eqx.combine(arrays, static), inputs, chosen)[0]

    def loss(arguments: Any, weights: Any) -> Any:
        states = jtu.tree_leaves(forward(*arguments))
        return sum(jnp.sum(w * jnp.square(h)) for w, h in zip(weights, states, strict=True))

    found = {"forward": Program(forward, (arrays, problem.inputs))}
    if "gradient" in case.kinds:
        shapes = jtu.tree_leaves(jax.eval_shape(forward, arrays, problem.inputs))
        keys = jax.random.split(jax.random.key(1), len(shapes))
        weights = [
            jax.random.normal(k, h.shape, h.dtype) for k, h in zip(keys, shapes, strict=True)
        ]
        arguments = (arrays, problem.inputs), weights
        found["gradient"] = Program(jax.value_and_grad(loss), arguments)
    return found


def statistics(problem: Problem, chosen: tuple[Any, Any] | None) -> dict[str, Any]:
    """What a solve reports, run here; nothing of the scan."""
    if chosen is None:
        return {}
    arrays, static = eqx.partition(problem.cell, eqx.is_array)

    @jax.jit
    def run(arrays: Any, inputs: Any) -> Any:
        _, stats = _solution(eqx.combine(arrays, static), inputs, chosen)
        return stats.iterations, stats.sequential_steps, stats.fallback

    iterations, steps, fallback = run(arrays, problem.inputs)
    return {
        "iterations": int(iterations),
        "sequential_steps": int(steps),
        "fallback": bool(fallback),
    }


def _solution(cell: prnn.AbstractCell, inputs: Any, chosen: tuple[Any, Any] | None) -> Any:
    return scanned(cell, inputs) if chosen is None else solved(cell, inputs, *chosen)


# --- the questions, the most interesting first -------------------------------------------------

LENGTH = 65_536


def default_cases() -> Iterator[Case]:
    """The scan and the choice for every cell; shorter sequences; other solvers."""
    for cell in CELLS:
        # All Jacobians of M²RNN's 1,024 state elements are tens of gigabytes.
        observed = 1024 if cell.startswith("M2RNN") else None
        for solver in (SCAN, CHOICE, CHOICE + NO_KERNELS):
            yield Case(cell, 64, LENGTH, solver, observed=observed)
    for length in (4096, 1024):
        for solver in (SCAN, CHOICE, CHOICE + NO_KERNELS):
            yield Case("DiagonalGRU", 64, length, solver)
    for cell in ("DiagonalGRU", "GRU, forgets"):
        for solver in ("Newton(1)", "Newton(16)", "Newton(64)", "Jacobi(64)"):
            yield Case(cell, 64, LENGTH, solver)


def quick_cases() -> Iterator[Case]:
    """Some that compile in a minute, for the check against committed counts."""
    for solver in (SCAN, CHOICE, CHOICE + NO_KERNELS):
        yield Case("DiagonalGRU", 64, 1024, solver)
