import dataclasses
import functools
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import flip_time, or_zeros
from .._recurrence import Recurrence
from .._step_properties import why_no_transpose
from .._tracing import typed_slice
from ..solvers import AbstractSolver, Newton
from ._base import AbstractLinearAdjoint, check_length, with_opaque_constants


@dataclasses.dataclass(frozen=True)
class LinearSolveAdjoint(AbstractLinearAdjoint):
    """Solves the derivative's linear recurrence by a solver, forwards for tangents and backwards
    for cotangents, through `jax.lax.custom_linear_solve`. A bare solver as `adjoint` is this.

    What is kept for the backward pass is the states, the inputs and the parameters, and nothing
    else: the Jacobians are recomputed.

    **Arguments:**

    - `solver`: of both recurrences.
    """

    solver: AbstractSolver = Newton()

    @property
    def supports_sharding(self):
        return self.solver.supports_sharding

    @property
    def axis(self):
        return self.solver.axis

    def resolved(self, recurrence, platform=None, batch=1):
        return LinearSolveAdjoint(self.solver.resolved(recurrence, platform))

    @property
    def backward_solver(self):
        return self.solver

    def tangents(self, recurrence, states, tangents):
        check_length(self.solver, recurrence)

        def images(recurrence):
            return with_opaque_constants(recurrence, tangents.step).images(states)

        images = eqx.filter_checkpoint(images)
        _, offsets = eqx.filter_jvp(images, (recurrence,), (tangents,))
        offsets = or_zeros(offsets, states)
        if len(jtu.tree_leaves(offsets)) > 1:
            offsets = tied(offsets, tangents)
        return _linear_solve(self.solver, recurrence, states, offsets)


def tied(offsets: PyTree[Array], tangents: PyTree[Array | None]) -> PyTree[Array]:
    """The `offsets`, each of which depends on all `tangents` as far as JAX can tell.

    `custom_linear_solve` can be transposed only with respect to all leaves of its right-hand side
    at once; that of a leaf which depends on nothing but the state (a delay line, a clock) is a
    constant zero. By selection, as the product of zero and infinity is NaN; XLA removes it.
    """
    leaves, treedef = jtu.tree_flatten(offsets)
    total = sum(jnp.sum(t).real.astype(jnp.float32) for t in jtu.tree_leaves(tangents))
    tied = [jnp.where(jnp.zeros_like(b, bool), jnp.asarray(total, b.dtype), b) for b in leaves]
    return jtu.tree_unflatten(treedef, tied)


def _linear_solve(
    solver: AbstractSolver, recurrence: Recurrence, states: PyTree[Array], offsets: PyTree[Array]
) -> PyTree[Array]:
    """Solves `v[t] - J[t] v[t-1] = offsets[t]` in a way that JAX can transpose."""
    step, xs = recurrence.step, recurrence.xs
    zero = jtu.tree_map(jnp.zeros_like, recurrence.init)
    # A Jacobian that has the structure has its transpose in the structure, too.
    structure = recurrence.structure
    shards = recurrence.row_shards

    def push(state: Any, x: Any, tangent: Any):
        return jax.jvp(lambda s: step(s, x), (state,), (tangent,))[1]

    def push_step(v, inputs):
        state, x, offset = inputs
        return jtu.tree_map(jnp.add, push(state, x, v), offset)

    # Carries what has gone through the step already, so that all steps meet inputs of their own
    # time, which need no shifting.
    def pull_step(v, inputs):
        state, x, cotangent = inputs
        total = jtu.tree_map(jnp.add, v, cotangent)
        return jax.vjp(lambda s: step(s, x), state)[1](total)[0]

    def through(linear_step, inputs, reverse=False):
        turned = reverse and not solver.runs_backwards
        inputs, row_shards = (flip_time(inputs), shards.backwards()) if turned else (inputs, shards)
        reverse = reverse and not turned
        linear = Recurrence(
            linear_step, inputs, zero, structure=structure, reverse=reverse, row_shards=row_shards
        )
        states = solver.solve_affine(linear)
        return flip_time(states) if turned else states

    # JAX computes in the forward pass, and keeps, whatever these do not need `v`, `b` or `g` for,
    # unless told to rematerialise it.

    @jax.checkpoint
    def residual(v):
        # All steps at once, and then their tangents: the other way round, JAX puts a
        # `stop_gradient`, which has no transpose, at the operands of a `cond`.
        before, tangents = recurrence.previous(states), shards.shift_right(v, zero)
        _, pushed = jax.jvp(lambda hs: jax.vmap(step)(hs, xs), (before,), (tangents,))
        return jtu.tree_map(jnp.subtract, v, pushed)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def solve(_, b):
        return through(push_step, (recurrence.previous(states), xs, b))

    @functools.partial(jax.checkpoint, static_argnums=0)
    def transpose_solve(_, g):
        pulled = through(pull_step, (recurrence.previous(states), xs, g), reverse=True)
        return jtu.tree_map(jnp.add, g, shards.shift_left(pulled, zero))

    # JAX traces the transposed solve at once, also where it only pushes tangents.
    if recurrence.has_cotangents:
        return jax.lax.custom_linear_solve(residual, offsets, solve, transpose_solve)
    pushed = jax.lax.custom_linear_solve(residual, offsets, solve)
    reason = why_no_transpose(step, recurrence.init, typed_slice(xs))
    message = (
        f"`step` cannot be differentiated in reverse mode. JAX says of it: {reason} Rewrite it, "
        "put a `jax.custom_vjp` around that part, or push tangents forward (`jax.jvp`, "
        "`jax.jacfwd`)."
    )
    return eqxi.nondifferentiable_backward(pushed, msg=message)
