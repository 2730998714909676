"""Does a solver give the numbers of the sequential run, in values and gradients?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._misc import make_ravel, num_steps, previous_states, time_slice
from .._recurrence import scan_states
from .._solution import RESULTS
from .._step_properties import check_alone
from ..adjoints import AbstractAdjoint
from ..solvers import AbstractSolver
from ..structures import AbstractStructure
from ._agreement import GRADIENT_FACTOR, Agreement
from ._problem import AnyRecurrence, Problem, check_batch_size, make_problem
from ._purity import is_pure
from ._streaming import broken_promises

_IMPURE = (
    "the step gives other numbers when it is traced again. It must be a pure function of "
    "`(state, x)`: take random numbers, counters and whatever else changes in by `xs` or the state"
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What [`pararnn.verify`][] found. `bool(verification)` is `ok`; printing it explains.

    - `ok`: whether everything agrees within `tolerance`.
    - `value_error`, `gradient_error`: the largest difference to the sequential run of any element
        of any state, and of any gradient with respect to inputs and initial state; 1 is 100 % of
        the largest magnitude that the same element had lately.
    - `structure_ok`: whether the declared structure contains the Jacobian that was found.
    - `result`: the message of the solve; empty if successful.
    - `fallback`: whether steps were finished sequentially.
    - `tolerance`: for the values; gradients are allowed ten times as much.
    - `broken_promises`: what is wrong with `project`, `readout` or streaming of a cell, a sentence
        each.
    - `where`: the state that is furthest off, if the values disagree; empty otherwise.
    - `value_difference`, `gradient_difference`: the errors without regard to rounding: larger than
        `value_error` and `gradient_error` where rounding explains them, as in a chaotic system.
    - `pure`: whether the step gives the same numbers when it is traced again. Of one that does not,
        nothing else is measured: the errors are NaN.
    """

    ok: bool
    value_error: float
    gradient_error: float
    structure_ok: bool
    result: str
    fallback: bool
    tolerance: float
    broken_promises: tuple[str, ...] = ()
    where: str = ""
    value_difference: float = 0.0
    gradient_difference: float = 0.0
    pure: bool = True

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        agrees = self.value_error <= self.tolerance
        agrees = agrees and self.gradient_error <= GRADIENT_FACTOR * self.tolerance
        if self.ok:
            first = "agrees with the sequential run"
        elif not self.pure:
            first = f"FAILED: {_IMPURE}"
        elif agrees and self.broken_promises and self.structure_ok and not self.result:
            first = "FAILED: agrees with the sequential run, but the cell breaks its promises"
        else:
            first = "DISAGREES with the sequential run"
        lines = [
            first,
            "  values:    "
            + _figure(self.value_error, self.value_difference, self.tolerance)
            + (f": {self.where}" if self.where else ""),
            "  gradients: "
            + _figure(
                self.gradient_error, self.gradient_difference, GRADIENT_FACTOR * self.tolerance
            ),
        ]
        if not self.structure_ok and self.pure:
            lines.append("  the declared structure leaves out entries of the Jacobian")
        lines += [f"  {sentence}" for sentence in self.broken_promises]
        if self.fallback:
            lines.append("  some steps were finished sequentially")
        if self.result:
            lines.append(f"  result: {self.result}")
        return "\n".join(lines)


def _figure(error: float, difference: float, tolerance: float) -> str:
    """What was measured; and where that is nothing but a bound, what it is."""
    if np.isnan(error):
        return "not measured: there is no one sequence of numbers to compare with"
    if error <= tolerance < difference:
        return (
            f"off by {difference:.1e}, which rounding explains: as far apart are sequential runs "
            f"with other roundings (tolerance {tolerance:.1e})"
        )
    shown = f"{error:.1e}" if np.isfinite(error) else "not finite"
    return f"{shown} (tolerance {tolerance:.1e})"


def verify(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    solver: AbstractSolver | None = None,
    *,
    adjoint: AbstractSolver | AbstractAdjoint | None = None,
    structure: AbstractStructure | None = None,
    tolerance: float | None = None,
    batch_size: int | None = None,
    axis_name: Any = None,
) -> Verification:
    """Compares a solver with the sequential run: values, gradients, and a declared structure; of a
    cell or a layer also its projection, its readout, and streaming.

    Runs outside of `jit`, on concrete arrays. The reference is differentiated by JAX through
    `jax.lax.scan`, not by this package.

    The step is traced twice first: one that gives other numbers the second time is no function of
    its arguments, and is told so.

    Each element of the state is judged on its own: a difference counts by the largest magnitude
    that the same element had within the last sixteenth of the sequence. What rounding explains, as
    repeated sequential runs with other roundings show, counts as the tolerance at most; then each
    state must also be the step's image of the one before it, so that a trajectory of a chaotic
    system is right if it is one.

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][], whose
        solver, adjoint, structure and initial state are taken unless given here.
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and the state to start from, which may be left out.
    - `solver`, `adjoint`, `structure`: as for [`pararnn.solve`][]. A [`pararnn.ClippedAdjoint`][]
        is compared with its limit lifted.
    - `tolerance`: for the error of the values; `None` is 1e-5 in float32 and 1e-10 in float64, and
        follows the dtype's precision in others.
    - `batch_size`: solves so many sequences at once, with `jax.vmap`: `xs`, and `xs` rolled along
        time by further and further. `None` solves `xs` alone, without `vmap`.
    - `axis_name`: of the `vmap` over `batch_size`, for a step with collectives such as `lax.pmean`.

    **Returns:**

    A [`pararnn.Verification`][].

    **Raises:**

    `ValueError` or `TypeError` naming the argument, as [`pararnn.solve`][] does.
    """
    check_batch_size(batch_size)
    if axis_name is not None and batch_size is None:
        raise ValueError("`axis_name` needs a `batch_size`: it names the axis of the sequences.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive, or None; got {tolerance!r}.")
    one = make_problem(recurrence, xs, init, solver=solver, adjoint=adjoint, structure=structure)
    problem = one if batch_size is None else one.batched(batch_size, axis_name)
    if axis_name is None:
        check_alone("verify", one.step, one.init, time_slice(one.us))
    weights = _weights(problem)
    states_of = _solving(one)
    if batch_size is not None:
        states_of = jax.vmap(states_of, in_axes=(1, 0), out_axes=(1, 0), axis_name=axis_name)
    expected, expected_gradient, _ = _pulled(
        lambda us, init: (scan_states(problem.step, us, init), None), problem, weights
    )
    agreement = Agreement(problem.step, problem.us, problem.init, expected, tolerance)
    tolerance = agreement.tolerance
    if not is_pure(problem.step, problem.us, problem.init, expected):
        return _unmeasured(tolerance)
    states, gradient, (result, stats) = _pulled(states_of, problem, weights)
    value_error = agreement.value_error(states)
    gradient_error = agreement.gradient_error(gradient, expected_gradient, states, weights)
    structure_ok = _contains(one, problem, expected, axis_name)
    first = expected if batch_size is None else jtu.tree_map(lambda h: h[:, 0], expected)
    broken = broken_promises(one, first)
    message = _message(result)
    ok = value_error <= tolerance and gradient_error <= GRADIENT_FACTOR * tolerance
    return Verification(
        ok=ok and structure_ok and not broken and not message,
        value_error=value_error,
        gradient_error=gradient_error,
        structure_ok=structure_ok,
        result=message,
        fallback=bool(np.any(stats.fallback)),
        tolerance=tolerance,
        broken_promises=broken,
        where=agreement.where,
        value_difference=agreement.value_difference,
        gradient_difference=agreement.gradient_difference,
    )


def _unmeasured(tolerance: float) -> Verification:
    """Of a step that is no function."""
    nothing = float("nan")
    return Verification(
        ok=False,
        value_error=nothing,
        gradient_error=nothing,
        structure_ok=False,
        result="",
        fallback=False,
        tolerance=tolerance,
        value_difference=nothing,
        gradient_difference=nothing,
        pure=False,
    )


def _solving(problem: Problem) -> Callable[..., Any]:
    """From inputs and initial state to the states, and the report, of the solver in question."""

    def states_of(us, init):
        solution = problem.solution(
            problem.step, us, init, solver=problem.solver, adjoint=problem.adjoint
        )
        return solution.states, (solution.result, solution.stats)

    return states_of


def _pulled(function: Callable[..., Any], problem: Problem, weights: PyTree[Any]) -> Any:
    """`(states, gradient, report)`: what a function makes of inputs and initial state, with the
    derivative of the states' sum with these weights."""

    @eqx.filter_jit
    def run(inputs):
        states, pull, report = eqx.filter_vjp(
            lambda inputs: function(*inputs), inputs, has_aux=True
        )
        return states, pull(weights)[0], report

    return run((problem.us, problem.init))


def _weights(problem: Problem) -> PyTree[Any]:
    """Random cotangents of all states."""
    length = num_steps(problem.us)
    leaves, treedef = jtu.tree_flatten(problem.init)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [
        jax.random.normal(k, (length, *h.shape), h.dtype) for k, h in zip(keys, leaves, strict=True)
    ]
    return jtu.tree_unflatten(treedef, weights)


def _message(result: Any) -> str:
    """Empty if all sequences were solved; else the message of the first that was not."""
    failed = np.flatnonzero(np.asarray(result != RESULTS.successful))
    if not failed.size:
        return ""
    return RESULTS[jtu.tree_map(lambda r: jnp.ravel(r)[int(failed[0])], result)]


def _contains(problem: Problem, batch: Problem, states, axis_name) -> bool:
    """Whether the Jacobians at some of the states lie inside the declared structure."""
    structure = problem.structure
    if structure is None or num_steps(problem.us) == 0:
        return True
    ravel, unravel, size, _ = make_ravel(problem.init)
    before = previous_states(batch.init, states)
    sample = np.unique(np.linspace(0, num_steps(problem.us) - 1, 8).astype(int))
    pick = jtu.tree_map(lambda x: x[sample], (before, batch.us))

    def jacobian(state, x):
        return jax.jacfwd(lambda v: ravel(problem.step(unravel(v), x)))(ravel(state))

    if batch is not problem:
        jacobian = jax.vmap(jacobian, axis_name=axis_name)
    full = np.asarray(jax.jit(jax.vmap(jacobian))(*pick)).astype(float).reshape(-1, size, size)
    seeds = structure.seeds(size, full.dtype)
    kept = structure.to_dense(structure.compress(jnp.einsum("nij,kj->nki", full, seeds)))
    # Each element of the state by what moves it most.
    scale = np.max(np.abs(full), axis=(0, 2), initial=1e-30)[:, None]
    return bool(np.all(np.abs(np.asarray(kept) - full) <= 1e-5 * np.abs(full) + 1e-6 * scale))
