"""The cases: cells, lengths and solvers, and the functions to compile for each."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import pararnn as prnn
from benchmarks import _solvers
from benchmarks._solvers import CHOICE, NO_KERNELS, SCAN
from benchmarks._systems import CELLS, VARIANTS, scanned, solved

PLATFORM = "cuda"
KINDS = ("forward", "gradient")
LENGTH = 65_536


class Case(NamedTuple):
    """One sequence in float32, and its solver: forward, and forward and gradient.

    - `cell`, `size`, `length`: the name of the cell, the size of its inputs, the steps.
    - `solver`: see `settings`.
    - `kinds`: which of `KINDS` are compiled.
    - `observed`: the length at which the trips of the loops are counted by running the same solver,
        where a machine without a GPU has too little memory for `length`; `None` is that.
    """

    cell: str
    size: int
    length: int
    solver: str
    kinds: tuple[str, ...] = KINDS
    observed: int | None = None

    def key(self) -> str:
        return f"{self.cell} D={self.size} L={self.length} {self.solver}"


def cell_and_inputs(case: Case) -> tuple[prnn.AbstractCell, Any]:
    """Seeded weights, and random inputs before the projection."""
    key_cell, key_x = jax.random.split(jax.random.key(0))
    cell = (CELLS | VARIANTS)[case.cell](case.size, dtype=jnp.float32, key=key_cell)
    return cell, jax.random.normal(key_x, (case.length, case.size), jnp.float32)


def settings(text: str, cell: prnn.AbstractCell, xs: Any) -> tuple[Any, Any] | None:
    """The solver and the adjoint of a name, with all options resolved for a GPU.

    `lax.scan` is the plain scan: `None`. `choice` is the package's choice; others are as for
    `benchmarks speed`.
    """
    if text == SCAN:
        return None
    return _solvers.settings(text.replace(CHOICE, "default"), cell, xs, PLATFORM)


class Program(NamedTuple):
    """A function and its arguments, all of them arrays."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def programs(case: Case, chosen: tuple[Any, Any] | None) -> dict[str, Program]:
    """By kind: the states; and the value and the gradient of a sum of their squares with random
    weights, with respect to parameters and inputs. With `"stats"`, the statistics of the solve."""
    cell, xs = cell_and_inputs(case)
    arrays, static = eqx.partition(cell, eqx.is_array)
    inputs = eqx.filter_jit(lambda cell, xs: cell.project(xs))(cell, xs)

    def solution(arrays: Any, inputs: Any) -> Any:
        cell = eqx.combine(arrays, static)
        return scanned(cell, inputs) if chosen is None else solved(cell, inputs, *chosen)

    def forward(arrays: Any, inputs: Any) -> Any:
        return solution(arrays, inputs)[0]

    def loss(arguments: Any, weights: Any) -> Any:
        states = jtu.tree_leaves(forward(*arguments))
        return sum(jnp.sum(w * jnp.square(h)) for w, h in zip(weights, states, strict=True))

    found = {"forward": Program(forward, (arrays, inputs))}
    if "gradient" in case.kinds:
        shapes = jtu.tree_leaves(jax.eval_shape(forward, arrays, inputs))
        keys = jax.random.split(jax.random.key(1), len(shapes))
        weights = [
            jax.random.normal(k, h.shape, h.dtype) for k, h in zip(keys, shapes, strict=True)
        ]
        arguments = (arrays, inputs), weights
        found["gradient"] = Program(jax.value_and_grad(loss), arguments)
    found["stats"] = Program(lambda *args: solution(*args)[1], (arrays, inputs))
    return found


# --- the cases, the most important first ------------------------------------------------------


def default_cases() -> Iterator[Case]:
    """The scan and the choice for every cell; shorter sequences; other solvers."""
    for cell in ("DiagonalGRU", "DiagonalLSTM", "GRU, forgets", "M2RNN, 4 heads"):
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
