r"""The derivative of all states with respect to everything they depend on.

Differentiating $h_t = f_θ(h_{t-1}, x_t)$ at its solution gives the linear recurrence

$$\dot h_t = J_t \dot h_{t-1} + b_t, \qquad J_t = \frac{∂f}{∂h}(h_{t-1}, x_t), \quad
b_t = \frac{∂f}{∂θ} \dot θ + \frac{∂f}{∂x} \dot x_t \;(+\, J_0 \dot h_{-1} \text{ at } t = 0),$$

with the *true* Jacobian, whatever the forward iteration used; the iterations are never
differentiated. Its transpose, which reverse mode needs, is the recurrence
$λ_t = J_{t+1}^\top λ_{t+1} + g_t$ run backwards.

How the modes come about: a `custom_jvp` rule whose tangents come from something that JAX can
transpose, batch, and differentiate again (the rule calls the differentiable function itself):
either one pass over all steps (`_tangents.py`), or `lax.custom_linear_solve`, in which both
recurrences go to the same solvers as the forward problem. What either closes over is the states,
the inputs and the parameters, and nothing else: $J$ is recomputed, and `b` is rematerialised.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._detection import detect_structure
from ._devices import typed_slice
from ._misc import flip_time, is_complex, or_zeros, previous_states
from ._outcome import judge, throw_unless_successful
from ._structure import AbstractStructure
from ._tangents import sequential_tangents
from ._traits import lacks_transpose
from .solvers import AbstractIterativeSolver, AbstractSolver, Newton, Sequential, run, run_linear


def select_adjoint(platform: str) -> AbstractSolver:
    """The solver for the derivative's linear recurrence that `adjoint=None` stands for.

    On a CPU, one pass over all steps, which stores no Jacobians. Elsewhere Newton's method, whose
    single correction is exact here.
    """
    return Sequential() if platform == "cpu" else Newton()


@eqx.filter_custom_jvp
def solve_states(
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    guess: PyTree[Array] | None,
    *,
    solver: AbstractSolver,
    adjoint: AbstractSolver | None,
    structure: AbstractStructure | None,
    report: Callable[[int, float, int, int], Any] | None = None,
    throw: str | None = None,
    batch: int = 1,
):
    """`(states, result, stats)` of a recurrence of at least one step, differentiable.

    `step` must carry everything it depends on as array leaves (`convert_step`).
    `throw` is the place that an error at run time names; without one, none is raised.
    `batch` is a hint for the derivative: how many sequences `jax.vmap` makes of this one.
    """
    if structure is None and not isinstance(solver, Sequential):
        structure = detect_structure(step, init, typed_slice(xs))
    states, converged, stats = run(solver, step, xs, init, guess, structure, report)
    result = judge(states, converged)
    # Here and not on what `solve` returns, so that derivatives read checked states, too.
    if throw is not None:
        states = throw_unless_successful(states, result, throw)
    return states, result, stats


@solve_states.def_jvp
def _solve_states_jvp(
    primals, tangents, *, solver, adjoint, structure, report=None, throw=None, batch=1
):
    step, xs, init, guess = primals
    *tangents, _ = tangents  # the solution does not depend on the guess
    if adjoint is None:
        adjoint = select_adjoint(jax.default_backend())
    in_one_pass = isinstance(adjoint, Sequential)
    if structure is None and not (in_one_pass and isinstance(solver, Sequential)):
        structure = detect_structure(step, init, typed_slice(xs))
    out = solve_states(
        step,
        xs,
        init,
        guess,
        solver=solver,
        adjoint=adjoint,
        structure=structure,
        report=report,
        throw=throw,
        batch=batch,
    )
    states, *others = out
    silent = jtu.tree_map(lambda _: None, others)
    if not jtu.tree_leaves(tangents):
        return out, (jtu.tree_map(lambda _: None, states), *silent)

    if in_one_pass:
        solution = sequential_tangents(step, xs, init, states, tuple(tangents), batch=batch)
        return out, (solution, *silent)

    @eqx.filter_checkpoint
    def all_steps(step, xs, init):
        return jax.vmap(step)(previous_states(init, states), xs)

    _, offsets = eqx.filter_jvp(all_steps, (step, xs, init), tuple(tangents))
    offsets = _tied(or_zeros(offsets, states), tangents)
    solution = _linear_solve(step, xs, init, states, offsets, adjoint, structure)
    return out, (solution, *silent)


def _tied(offsets: PyTree[Array], tangents: PyTree[Array | None]) -> PyTree[Array]:
    """The same numbers, each of which depends on all `tangents` as far as JAX can tell.

    `custom_linear_solve` can be transposed only with respect to all leaves of its right-hand side
    at once; that of a leaf which depends on nothing but the state (a delay line, a clock) is a
    constant zero. By selection, as the product of zero and infinity is NaN; XLA removes it.
    """
    leaves, treedef = jtu.tree_flatten(offsets)
    if len(leaves) == 1:
        return offsets
    total = sum(jnp.sum(t).real.astype(jnp.float32) for t in jtu.tree_leaves(tangents))
    tied = [jnp.where(jnp.zeros_like(b, bool), jnp.asarray(total, b.dtype), b) for b in leaves]
    return jtu.tree_unflatten(treedef, tied)


def _linear_solve(step, xs, init, states, offsets, adjoint, structure):
    """Solves `v[t] - J[t] v[t-1] = offsets[t]` in a way that JAX can transpose."""
    zero = jtu.tree_map(jnp.zeros_like, init)
    if isinstance(adjoint, AbstractIterativeSolver):
        # A derivative has no place to report a failure: it must always be finished.
        adjoint = dataclasses.replace(adjoint, fallback=True)

    def push(state: Any, x: Any, tangent: Any):
        return jax.jvp(lambda s: step(s, x), (state,), (tangent,))[1]

    def pull(state: Any, x: Any, cotangent: Any):
        return jax.vjp(lambda s: step(s, x), state)[1](cotangent)[0]

    def add(a, b):
        return jtu.tree_map(jnp.add, a, b)

    # JAX computes in the forward pass, and keeps, whatever these do not need `v`, `b` or `g` for,
    # unless told to rematerialise it.

    @jax.checkpoint
    def residual(v):
        pushed = jax.vmap(push)(previous_states(init, states), xs, previous_states(zero, v))
        return jtu.tree_map(jnp.subtract, v, pushed)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def solve(_, b):
        def linear_step(v, inputs):
            state, x, b = inputs
            return add(push(state, x, v), b)

        inputs = (previous_states(init, states), xs, b)
        return run_linear(adjoint, linear_step, inputs, zero, structure)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def transpose_solve(_, g):
        def linear_step(v, inputs):
            state, x, g = inputs
            return add(pull(state, x, v), g)

        inputs = _backward_inputs(xs, init, states, g)
        return flip_time(run_linear(adjoint, linear_step, inputs, zero, structure))

    # JAX traces the transposed solve at once, also where it only pushes tangents.
    forward_only = lacks_transpose(step, init, typed_slice(xs))
    transposed = None if forward_only else transpose_solve
    return jax.lax.custom_linear_solve(residual, offsets, solve, transposed)


def _backward_inputs(xs, init, states, cotangents):
    """What the steps of the recurrence backwards in time consume: step t meets J[t+1], which is
    that of the state after step t and the next input. The first meets no Jacobian, as it starts
    from 0: any will do."""
    state_before_next = jtu.tree_map(
        lambda h, h0: jnp.concatenate([h[:-1], jnp.expand_dims(h0, 0)]), states, init
    )
    next_xs = jtu.tree_map(lambda x: jnp.roll(x, -1, axis=0), xs)
    return flip_time((state_before_next, next_xs, cotangents))


# --- clipping ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClippedAdjoint:
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

    def __post_init__(self):
        if isinstance(self.limit, bool) or not isinstance(self.limit, (int, float)):
            raise TypeError(f"`limit` must be a Python float; got {self.limit!r}.")
        if not self.limit > 0:
            raise ValueError(f"`limit` must be positive; got {self.limit}.")
        if not isinstance(self.solver, AbstractSolver):
            raise TypeError(f"`solver` must be a solver instance; got {self.solver!r}.")


class _ClippedPull(eqx.Module):
    """One step backwards: an ordinary step of a recurrence whose state is the cotangent."""

    step: Callable[[Any, Any], Any]
    limit: float

    def __call__(self, cotangent: PyTree[Array], inputs: tuple[Any, Any, Any]) -> PyTree[Array]:
        state, x, g = inputs
        (pulled,) = jax.vjp(lambda s: self.step(s, x), state)[1](cotangent)

        def clip(a, b):
            if is_complex(a):
                return jax.lax.complex(clip(a.real, b.real), clip(a.imag, b.imag))
            return jnp.clip(a + b, -self.limit, self.limit)

        return jtu.tree_map(clip, pulled, g)


@eqx.filter_custom_vjp
def solve_states_clipped(
    problem: tuple[Any, PyTree[Array], PyTree[Array]],
    guess: PyTree[Array] | None,
    adjoint: ClippedAdjoint,
    **options: Any,
):
    """As `solve_states(*problem, guess, **options)`, but for the derivative."""
    return solve_states(*problem, guess, adjoint=None, **options)


@solve_states_clipped.def_fwd
def _solve_states_clipped_fwd(perturbed, problem, guess, adjoint, **options):
    # Derivatives of the clipped gradient are those of what is computed here and below.
    out = solve_states(*problem, guess, adjoint=None, **options)
    return out, out[0]


@solve_states_clipped.def_bwd
def _solve_states_clipped_bwd(
    states, cotangents, perturbed, problem, guess, adjoint, *, structure, **_
):
    step, xs, init = problem
    solver = adjoint.solver
    if isinstance(solver, AbstractIterativeSolver):
        # A derivative has no place to report a failure: it must always be finished.
        solver = dataclasses.replace(solver, fallback=True)
    # Those of states that the loss does not read are left out.
    cotangents = or_zeros(cotangents[0], states)
    inputs = _backward_inputs(xs, init, states, cotangents)
    clipped, _, _ = solve_states(
        _ClippedPull(step, adjoint.limit),
        inputs,
        jtu.tree_map(jnp.zeros_like, init),
        None,
        solver=solver,
        adjoint=None,
        structure=structure,
        report=None,
    )

    def all_steps(problem):
        step, xs, init = problem
        return jax.vmap(step)(previous_states(init, states), xs)

    _, pull = eqx.filter_vjp(all_steps, problem)
    return pull(flip_time(clipped))[0]
