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

from ._misc import (
    agreement_tolerance,
    num_steps,
    previous_states,
    raveler,
    relative_error,
    time_slice,
)
from ._solution import RESULTS
from ._solve import solve
from ._structure import AbstractStructure
from ._traits import check_alone
from .solvers import AbstractSolver

_Step = Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What [`pararnn.verify`][] found. `bool(verification)` is `ok`; printing it explains.

    - `ok`: whether everything agrees within `tolerance`.
    - `value_error`, `gradient_error`: the largest difference to the sequential run of any state,
        and of any gradient with respect to inputs and initial state, relative to the largest
        magnitude in its leaf.
    - `structure_ok`: whether the declared structure contains the Jacobian that was found.
    - `result`: the message of the solve; empty if successful.
    - `fallback`: whether steps were finished sequentially.
    - `tolerance`: for the values; gradients are allowed ten times as much.
    """

    ok: bool
    value_error: float
    gradient_error: float
    structure_ok: bool
    result: str
    fallback: bool
    tolerance: float

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [
            "agrees with the sequential run" if self.ok else "DISAGREES with the sequential run",
            f"  values:    {self.value_error:.1e} (tolerance {self.tolerance:.1e})",
            f"  gradients: {self.gradient_error:.1e} (tolerance {10 * self.tolerance:.1e})",
        ]
        if not self.structure_ok:
            lines.append("  the declared structure leaves out entries of the Jacobian")
        if self.fallback:
            lines.append("  some steps were finished sequentially")
        if self.result:
            lines.append(f"  result: {self.result}")
        return "\n".join(lines)


def verify(
    step: _Step,
    xs: PyTree[Any],
    init: PyTree[Any],
    solver: AbstractSolver | None = None,
    *,
    adjoint: AbstractSolver | None = None,
    structure: AbstractStructure | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compares a solver with the sequential run: values, gradients, and a declared structure.

    Runs outside of `jit`, on concrete arrays. The reference is differentiated by JAX through
    `jax.lax.scan`, not by this package.

    **Arguments:**

    - `step`, `xs`, `init`, `solver`, `adjoint`, `structure`: as for [`pararnn.solve`][].
    - `tolerance`: for the relative error of the values; `None` is 1e-5 in float32 and 1e-10 in
        float64, and follows the dtype's precision in others.

    **Returns:**

    A [`pararnn.Verification`][].
    """
    xs, init = jtu.tree_map(jnp.asarray, (xs, init))
    check_alone("verify", step, init, time_slice(xs))
    _, _, _, dtype = raveler(init)
    if tolerance is None:
        tolerance = agreement_tolerance(dtype)
    key = jax.random.key(0)
    length = num_steps(xs)

    def reference(xs, init):
        def body(state, x):
            state = step(state, x)
            return state, state

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(body, init, xs)[1]

    def ours(xs, init):
        solution = solve(
            step, xs, init, solver=solver, adjoint=adjoint, structure=structure, throw=False
        )
        return solution.states, solution

    leaves, treedef = jtu.tree_flatten(
        jtu.tree_map(lambda h: jax.ShapeDtypeStruct((length, *h.shape), h.dtype), init)
    )
    keys = jax.random.split(key, len(leaves))
    weights = [jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)]
    weights = jtu.tree_unflatten(treedef, weights)

    def pull(states_of, has_aux):
        @eqx.filter_jit
        def run(inputs):
            states, vjp, *aux = eqx.filter_vjp(
                lambda inputs: states_of(*inputs), inputs, has_aux=has_aux
            )
            return states, vjp(weights), aux

        return run((xs, init))

    expected, expected_gradient, _ = pull(reference, False)
    states, gradient, (solution,) = pull(ours, True)
    value_error = relative_error(states, expected)
    gradient_error = relative_error(gradient, expected_gradient)
    structure_ok = structure is None or _contains(structure, step, xs, init, expected)
    result = "" if bool(solution.result == RESULTS.successful) else RESULTS[solution.result]
    ok = value_error <= tolerance and gradient_error <= 10 * tolerance and structure_ok
    return Verification(
        ok=ok and not result,
        value_error=value_error,
        gradient_error=gradient_error,
        structure_ok=structure_ok,
        result=result,
        fallback=bool(solution.stats.fallback),
        tolerance=tolerance,
    )


def _contains(structure, step, xs, init, states) -> bool:
    """Whether the Jacobians at some of the states lie inside the declared structure."""
    ravel, unravel, size, _ = raveler(init)
    if num_steps(xs) == 0:
        return True
    before = previous_states(init, states)
    sample = np.unique(np.linspace(0, num_steps(xs) - 1, 8).astype(int))
    pick = jtu.tree_map(lambda x: x[sample], (before, xs))

    def jacobian(state, x):
        return jax.jacfwd(lambda v: ravel(step(unravel(v), x)))(ravel(state))

    full = np.asarray(jax.jit(jax.vmap(jacobian))(*pick)).astype(float)
    seeds = structure.seeds(size, full.dtype)
    kept = structure.to_dense(structure.compress(jnp.einsum("nij,kj->nki", full, seeds)))
    return bool(
        np.allclose(
            np.asarray(kept), full, rtol=1e-5, atol=1e-6 * np.max(np.abs(full), initial=1e-30)
        )
    )
