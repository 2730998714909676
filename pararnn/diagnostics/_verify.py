"""Comparison of a solver with the sequential run, in values and gradients."""

import dataclasses
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
from ._arguments import AnyRecurrence, SolveArguments, check_batch_size, solve_arguments
from ._promises import broken_promises, is_pure, sample_steps

_IMPURE = (
    "the step gives other numbers when it is traced again. It must be a pure function of "
    "`(state, x)`: take random numbers, counters and whatever else changes in by `xs` or the state"
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of [`pararnn.verify`][]. `bool(verification)` is `ok`; printing it explains.

    - `ok`: whether everything agrees within `tolerance`.
    - `value_error`, `gradient_error`: the largest difference to the sequential run of any element
        of any state, and of any gradient with respect to inputs and initial state; 1 is 100 % of
        the largest recent magnitude of the same element. Differences that rounding explains count
        as the tolerance at most.
    - `tolerance`: of the values; gradients get ten times as much.
    - `structure_ok`: whether the declared structure contains the Jacobian.
    - `result`: the message of the solve; empty if successful.
    - `fallback`: whether steps were finished sequentially.
    - `broken_promises`: errors in `project`, `readout` or streaming of a cell, a sentence each.
    - `where`: the worst state, if the values disagree; empty otherwise.
    - `value_difference`, `gradient_difference`: the errors without regard to rounding. They exceed
        `value_error` and `gradient_error` where rounding explains them, as in a chaotic system.
    - `pure`: whether the step gives the same numbers when it is traced again. If not, nothing else
        is measured: the errors are NaN.
    """

    tolerance: float
    ok: bool = False
    value_error: float = float("nan")
    gradient_error: float = float("nan")
    structure_ok: bool = False
    result: str = ""
    fallback: bool = False
    broken_promises: tuple[str, ...] = ()
    where: str = ""
    value_difference: float = float("nan")
    gradient_difference: float = float("nan")
    pure: bool = True

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        allowed = GRADIENT_FACTOR * self.tolerance
        agrees = self.value_error <= self.tolerance and self.gradient_error <= allowed
        if self.ok:
            first = "agrees with the sequential run"
        elif not self.pure:
            first = f"FAILED: {_IMPURE}"
        elif agrees and self.broken_promises and self.structure_ok and not self.result:
            first = "FAILED: agrees with the sequential run, but the cell breaks its promises"
        else:
            first = "DISAGREES with the sequential run"
        values = _figure(self.value_error, self.value_difference, self.tolerance)
        lines = [
            first,
            f"  values:    {values}" + (f": {self.where}" if self.where else ""),
            f"  gradients: {_figure(self.gradient_error, self.gradient_difference, allowed)}",
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
    *,
    solver: AbstractSolver | None = None,
    adjoint: AbstractSolver | AbstractAdjoint | None = None,
    structure: AbstractStructure | None = None,
    tolerance: float | None = None,
    batch_size: int | None = None,
    axis_name: Any = None,
) -> Verification:
    """Compares a solver with the sequential run: values, gradients, and a declared structure; of a
    cell or a layer also `project`, `readout` and streaming.

    Runs outside of `jit`, on concrete arrays. JAX differentiates the reference through
    `jax.lax.scan`, independently of this package. A step that gives other numbers when it is traced
    again is reported as impure, and nothing is compared.

    [`pararnn.diagnostics.Agreement`][] defines the errors: each element of the state is judged by
    its own recent magnitude, and differences that rounding explains, as in a chaotic system, are
    admitted where each state is the step's image of the one before it.

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][], whose
        solver, adjoint, structure and initial state are used unless they are arguments here.
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and optionally the initial state.
    - `solver`, `adjoint`, `structure`: as for [`pararnn.solve`][]. A [`pararnn.ClippedAdjoint`][]
        is compared with its limit lifted.
    - `tolerance`: for the error of the values; `None` is 1e-5 in float32 and 1e-10 in float64, and
        follows the dtype's precision in others.
    - `batch_size`: how many sequences to solve at once, with `jax.vmap`: `xs`, and `xs` rolled
        along time by further and further. `None` solves `xs` alone, without `vmap`.
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
    one = solve_arguments(recurrence, xs, init, solver=solver, adjoint=adjoint, structure=structure)
    batch = one if batch_size is None else one.batched(batch_size, axis_name)
    if axis_name is None:
        check_alone("verify", one.step, one.init, time_slice(one.us))

    def scan(us, init):
        return scan_states(batch.step, us, init), None

    def solve(us, init):
        solution = one.solve(one.step, us, init, one.solver, one.adjoint)
        return solution.states, (solution.result, solution.stats)

    if batch_size is not None:
        solve = jax.vmap(solve, in_axes=(1, 0), out_axes=(1, 0), axis_name=axis_name)
    weights = _weights(batch)
    expected, expected_gradient, _ = _states_and_gradient(scan, batch, weights)
    agreement = Agreement(batch.step, batch.us, batch.init, expected, tolerance)
    tolerance = agreement.tolerance
    if not is_pure(batch.step, batch.us, batch.init, expected):
        return Verification(tolerance, pure=False)
    states, gradient, (result, stats) = _states_and_gradient(solve, batch, weights)
    values = agreement.value_error(states)
    gradients = agreement.gradient_error(gradient, expected_gradient, states, weights)
    structure_ok = _contains(one, batch, expected, axis_name)
    first = expected if batch_size is None else jtu.tree_map(lambda h: h[:, 0], expected)
    broken, message = broken_promises(one, first), _message(result)
    agrees = values.error <= tolerance and gradients.error <= GRADIENT_FACTOR * tolerance
    return Verification(
        tolerance,
        ok=agrees and structure_ok and not broken and not message,
        value_error=values.error,
        gradient_error=gradients.error,
        structure_ok=structure_ok,
        result=message,
        fallback=bool(np.any(stats.fallback)),
        broken_promises=broken,
        where=values.where,
        value_difference=values.difference,
        gradient_difference=gradients.difference,
    )


def _states_and_gradient(function, arguments: SolveArguments, weights: PyTree[Any]) -> Any:
    """`(states, gradient, report)` of `function(us, init)`, which returns the states and a report;
    the gradient is that of the states' sum with the weights."""

    @eqx.filter_jit
    def run(inputs):
        states, pull, report = eqx.filter_vjp(lambda args: function(*args), inputs, has_aux=True)
        return states, pull(weights)[0], report

    return run((arguments.us, arguments.init))


def _weights(arguments: SolveArguments) -> PyTree[Any]:
    """Random cotangents of all states."""
    leaves, treedef = jtu.tree_flatten(arguments.init)
    shapes = [(num_steps(arguments.us), *h.shape) for h in leaves]
    keys = jax.random.split(jax.random.key(0), len(leaves))
    normal = map(jax.random.normal, keys, shapes, [h.dtype for h in leaves])
    return jtu.tree_unflatten(treedef, list(normal))


def _message(result: Any) -> str:
    """The message of the first sequence that was not solved; empty if there is none."""
    failed = np.flatnonzero(np.asarray(result != RESULTS.successful))
    if not failed.size:
        return ""
    return RESULTS[jtu.tree_map(lambda r: jnp.ravel(r)[int(failed[0])], result)]


def _contains(one: SolveArguments, batch: SolveArguments, states, axis_name) -> bool:
    """Whether the Jacobians at some of the states lie inside the declared structure."""
    structure = one.structure
    if structure is None or num_steps(one.us) == 0:
        return True
    ravel, unravel, size, _ = make_ravel(one.init)
    before = previous_states(batch.init, states)
    sample = sample_steps(num_steps(one.us), 8)
    pick = jtu.tree_map(lambda x: x[sample], (before, batch.us))

    def jacobian(state, x):
        return jax.jacfwd(lambda v: ravel(one.step(unravel(v), x)))(ravel(state))

    if batch is not one:
        jacobian = jax.vmap(jacobian, axis_name=axis_name)
    full = np.asarray(jax.jit(jax.vmap(jacobian))(*pick)).astype(float).reshape(-1, size, size)
    seeds = structure.seeds(size, full.dtype)
    kept = structure.to_dense(structure.compress(jnp.einsum("nij,kj->nki", full, seeds)))
    # Relative to the largest entry of the row.
    scale = np.max(np.abs(full), axis=(0, 2), initial=1e-30)[:, None]
    return bool(np.all(np.abs(np.asarray(kept) - full) <= 1e-5 * np.abs(full) + 1e-6 * scale))
