import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._checked_solve import CheckedSolve
from .._misc import flip_time, is_complex, or_zeros
from .._recurrence import Recurrence
from ..solvers import AbstractSolver, Sequential
from ._base import AbstractAdjoint, Forward, check_length, with_opaque_constants
from ._wrapped import default_adjoint


@dataclasses.dataclass(frozen=True)
class ClippedAdjoint(AbstractAdjoint):
    r"""An `adjoint` that clips what flows back through time, at every step:

    $$λ_t = \mathrm{clip}(J_{t+1}^\top λ_{t+1} + g_t,\; -\mathrm{limit},\; \mathrm{limit}),$$

    elementwise, with $g_t$ the cotangent of the state after step $t$; of a complex state, real and
    imaginary part each. That is the gradient of a network in which each state passes through an
    identity whose cotangent is clipped. Where no element reaches the limit, it is the true one.

    The recurrence is nonlinear, so there is no linear map to transpose: reverse mode only.
    `jax.jvp`, `jax.jacfwd` and whatever else pushes tangents through the solve raise JAX's
    `TypeError` about forward mode and a `custom_vjp`.

    **Arguments:**

    - `limit`: the largest magnitude; positive.
    - `solver`: how the recurrence above is solved: any solver, as for a forward problem.
    """

    limit: float
    solver: AbstractSolver = Sequential()

    @property
    def supports_sharding(self):
        return self.solver.supports_sharding

    @property
    def axis(self):
        return self.solver.axis

    def __post_init__(self):
        if isinstance(self.limit, bool) or not isinstance(self.limit, (int, float)):
            raise TypeError(f"`limit` must be a Python float; got {self.limit!r}.")
        if not self.limit > 0:
            raise ValueError(f"`limit` must be positive; got {self.limit}.")
        if not isinstance(self.solver, AbstractSolver):
            raise TypeError(f"`solver` must be a solver instance; got {self.solver!r}.")

    def solve(self, forward, recurrence, guess):
        return _solve_clipped(recurrence, jax.lax.stop_gradient(guess), forward, self)

    def resolved(self, recurrence, platform=None, batch=1):
        if not recurrence.has_tangents:  # the structure of what flows back is found when it does
            return self
        return dataclasses.replace(self, solver=self.solver.resolved(recurrence, platform))

    def exact(self):
        return dataclasses.replace(self, limit=math.inf)


class _ClippedPull(eqx.Module):
    """One step backwards: an ordinary step of a recurrence whose state is what has flowed through
    the step already, so that all steps meet inputs of their own time."""

    step: Callable[[Any, Any], Any]
    limit: float

    def __call__(self, pulled: PyTree[Array], inputs: tuple[Any, Any, Any]) -> PyTree[Array]:
        state, x, g = inputs
        total = self.clipped(jtu.tree_map(jnp.add, pulled, g))
        return jax.vjp(lambda s: self.step(s, x), state)[1](total)[0]

    def clipped(self, cotangents: PyTree[Array]) -> PyTree[Array]:
        # Without a limit the step is affine in the cotangent, and is to be seen to be.
        return cotangents if self.limit == math.inf else jtu.tree_map(self._clip, cotangents)

    def _clip(self, x: Array) -> Array:
        if is_complex(x):
            return jax.lax.complex(self._clip(x.real), self._clip(x.imag))
        return jnp.clip(x, -self.limit, self.limit)


@eqx.filter_custom_vjp
def _solve_clipped(
    recurrence: Recurrence, guess: PyTree[Array] | None, forward: Forward, adjoint: ClippedAdjoint
):
    return forward(recurrence, guess)


@_solve_clipped.def_fwd
def _solve_clipped_fwd(perturbed, recurrence, guess, forward, adjoint):
    # Derivatives of the clipped gradient are those of what is computed here and below.
    out = default_adjoint().solve(forward, recurrence, guess)
    return out, out[0]


@_solve_clipped.def_bwd
def _solve_clipped_bwd(states, cotangents, perturbed, recurrence, guess, forward, adjoint):
    check_length(adjoint.solver, recurrence)
    # Those of states that the loss does not read are left out.
    cotangents = or_zeros(cotangents[0], states)
    step = _ClippedPull(recurrence.step, adjoint.limit)
    # Of a step without tangents the structure is not known; that of its derivative may be.
    structure = recurrence.structure if recurrence.has_tangents else None
    inputs = recurrence.previous(states), recurrence.xs, cotangents
    nothing = jtu.tree_map(jnp.zeros_like, recurrence.init)
    # A derivative has no place to report a failure: it must always be finished.
    forward = CheckedSolve(adjoint.solver.with_fallback())
    # Turned around, as the derivatives of what this computes need it.
    backward = Recurrence(
        step,
        flip_time(inputs),
        nothing,
        structure=structure,
        row_shards=recurrence.row_shards.backwards(),
    )
    pulled, _, _ = default_adjoint().solve(forward, backward, None)
    pulled = recurrence.row_shards.shift_left(flip_time(pulled), nothing)
    clipped = step.clipped(jtu.tree_map(jnp.add, pulled, cotangents))
    flags = jtu.tree_map(lambda flag: flag or None, perturbed.step)

    def images(recurrence):
        return with_opaque_constants(recurrence, flags).images(states)

    _, pull = eqx.filter_vjp(images, recurrence)
    return pull(clipped)[0]
