"""`solve`: checks the arguments, selects solver and adjoint, runs, and reports."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ._algebra import AbstractAlgebra
from ._batch import batch_size
from ._checked_solve import CheckedSolve, call_site, errors_of_steps, fail_unless_successful
from ._checks import (
    ExplainedStep,
    check_adjoint,
    check_algebra,
    check_callable,
    check_flags,
    check_guess,
    check_init,
    check_new_state,
    check_solver,
    check_xs,
    to_arrays,
)
from ._misc import make_ravel, num_steps, struct
from ._norms import all_finite
from ._packing import Packing, without_moving
from ._program_cache import is_traced, run_jitted
from ._recurrence import Recurrence, precise
from ._select import choose, inner, time_axis
from ._shards import choose_shards
from ._solution import RESULTS, Solution, Stats
from ._step_properties import check_unmasked
from ._tracing import on_mesh, typed_slice
from .adjoints import AbstractAdjoint
from .sharding._mesh import TimeAxis, both, over_devices
from .sharding._placement import mesh_context
from .solvers import AbstractSolver, Report
from .structures import AbstractStructure


def solve(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
    xs: PyTree[Any],
    init: PyTree[Any],
    *,
    solver: AbstractSolver | None = None,
    adjoint: AbstractSolver | AbstractAdjoint | None = None,
    reset: Bool[Array | np.ndarray, " L"] | None = None,
    reset_state: PyTree[Any] | None = None,
    mask: Bool[Array | np.ndarray, " L"] | None = None,
    guess: PyTree[Any] | None = None,
    structure: AbstractStructure | None = None,
    algebra: AbstractAlgebra | None = None,
    throw: bool = True,
    verbose: bool | Callable[[int, float, int, int], Any] = False,
) -> Solution:
    r"""All states of the recurrence $h_t = \mathrm{step}(h_{t-1}, x_t)$, $h_{-1} = \mathrm{init}$.

    One sequence, without a batch axis: use `jax.vmap` for batches. The result is that of
    `jax.lax.scan`, up to rounding and the solver's tolerance; `result` and `stats` say how it was
    reached. Derivatives of any order and mode are those of the recurrence itself, whatever the
    solver. Matrix products inside `step` run at full precision on every platform, because a rounded
    Jacobian ruins Newton's method. Compiled once per `step`, shapes and options.

    **Arguments:**

    - `step`: the recurrence, `step(state, x) -> state`: a pure function or callable module, and
        total: it is evaluated at states that the sequential run never meets, too, and must end
        there, with any result. A `while_loop` in it that ends near the true states only would hang.
        It may close over arrays, traced ones included; derivatives flow to them. If it exchanges
        values with other sequences of a batch (`jax.lax.pmean`), only `Sequential` solves it.
    - `xs`: the inputs: a pytree of arrays that share a leading axis of length `L`, which may be 0.
    - `init`: the initial state: a pytree of floating-point or complex arrays. Each state has its
        structure, shapes and dtypes.
    - `solver`: the method, for example [`pararnn.Newton`][]. `None` chooses by platform, structure
        and shape, as [`pararnn.select_solver`][] explains.
    - `adjoint`: the solver of the derivative's linear recurrence, which has the true Jacobian
        always. `None` is one pass over the steps on a CPU and for steps without a derivative in
        forward mode (`jax.custom_vjp`), and [`pararnn.Newton`][] elsewhere. A
        [`pararnn.ClippedAdjoint`][] clips what flows back through time; it has no forward mode. The
        others are in [`pararnn.adjoints`][].
    - `reset`: a boolean per step; where true, that step starts from `reset_state` and not from the
        state before it.
    - `reset_state`: the state to restart from, shaped like `init`; `None` is `init` itself.
    - `mask`: a boolean per step; where false, the step is padding and skipped: the state stays as
        it is, so that `final` is that of the last real step. The inputs of padding may be anything,
        NaN too, and get a derivative of zero. A `reset` within padding holds for the next real
        step.
    - `guess`: states to start the iteration from, shaped like the result, for example those of the
        previous training step. Changes the number of iterations, not the result; its derivative is
        zero.
    - `structure`: the structure of `∂step/∂state`, if it is known; it is detected otherwise. A
        wrong declaration costs convergence or, in the derivative, correctness.
    - `algebra`: an [`pararnn.AbstractAlgebra`][] that contains the steps, if there is one: then
        [`pararnn.AssociativeScan`][] solves the recurrence, which is the choice of an accelerator.
    - `throw`: raise an error at run time if the result is not `successful`.
    - `verbose`: print a line per iteration as it happens, under `jit` too; or a function to call
        with `(iteration, correction, converged, chunks)`: the iteration's number, its largest
        correction in units of the tolerance, how many chunks it found to start right, and how many
        there are.

    **Returns:**

    A [`pararnn.Solution`][].

    **Raises:**

    `ValueError` or `TypeError`, naming the argument, when the shapes, dtypes or types of the
    arguments do not fit together; `equinox.EquinoxRuntimeError` with `throw=True` when a state is
    not finite, or when the iteration did not converge with `fallback=False`.
    """
    check_callable(step)
    check_solver("solver", solver)
    check_adjoint(adjoint)
    if structure is not None and not isinstance(structure, AbstractStructure):
        raise TypeError(
            "`structure` must be a pararnn.Diagonal, BlockDiagonal or Dense, or None; "
            f"got {structure!r}."
        )
    check_algebra(algebra)
    xs, init = to_arrays("xs", xs), to_arrays("init", init)
    check_xs(xs)
    check_init(init)
    length = num_steps(xs)
    if reset is not None:
        reset = check_flags("reset", reset, length)
    if mask is not None:
        mask = check_flags("mask", mask, length)
    reset_state = init if reset_state is None else to_arrays("reset_state", reset_state)
    if struct(reset_state) != struct(init):
        raise ValueError(
            f"`reset_state` must be shaped like `init`, {struct(init)}; got {struct(reset_state)}."
        )
    if guess is not None:
        guess = to_arrays("guess", guess)
        check_guess(guess, init, length)
    if structure is not None:
        structure.check(make_ravel(init)[2])
    if not (isinstance(verbose, bool) or callable(verbose)):
        raise TypeError(f"`verbose` must be True, False or a function; got {verbose!r}.")
    report = (_print_progress if verbose else None) if isinstance(verbose, bool) else verbose
    arrays = _Arrays(xs, init, guess, reset, reset_state, mask)
    # On one device, nothing of `pararnn.sharding` runs.
    mesh = on_mesh((step, arrays))
    time = time_axis(solver, adjoint, (xs, init)) if length else None
    options = _Options(
        inner(solver),
        inner(adjoint),
        structure,
        algebra,
        report,
        batch_size((step, xs, init)),
        time,
    )
    return _run(step, arrays, options, throw, mesh)


class _Arrays(NamedTuple):
    """The arrays of a problem, of one sequence or this device's shard of it."""

    xs: PyTree[Array]
    init: PyTree[Array]
    guess: PyTree[Array] | None
    reset: Bool[Array, " L"] | None
    reset_state: PyTree[Array]
    mask: Bool[Array, " L"] | None


class _Options(NamedTuple):
    """The caller's choices, the batch size, and the mesh axis along which time is sharded."""

    solver: AbstractSolver | None
    adjoint: AbstractSolver | AbstractAdjoint | None
    structure: AbstractStructure | None
    algebra: AbstractAlgebra | None
    report: Report | None
    batch: int
    time: TimeAxis | None


def _run(step, arrays: _Arrays, options: _Options, throw: bool, mesh: bool) -> Solution:
    """Runs the compiled solve, and raises where it has failed."""

    def run(throw_from):
        with mesh_context((step, arrays)) if mesh else contextlib.nullcontext():
            return run_jitted(_solve_on_devices, step, arrays, options, throw_from)

    if not throw:
        return run(None)
    if is_traced((step, arrays)):
        return run(call_site())
    # Outside of all transformations no program needs to raise: the error comes from here.
    with errors_of_steps():
        solution = run(None)
        if is_traced(solution):  # `step` closes over values that are traced
            return run(call_site())
        successful = bool(solution.result == RESULTS.successful)
    if not successful:
        raise eqx.EquinoxRuntimeError(RESULTS[solution.result])
    return solution


def _solve_on_devices(step, arrays: _Arrays, options: _Options, throw_from) -> Solution:
    """Solves on this device; or on each device of a mesh, over which time is not sharded yet."""
    time = options.time
    if time is None or time.mesh is None:
        return _solve(step, arrays, options, throw_from)

    # Arguments as far as possible: on explicit axes JAX 0.10.2 lets nothing be closed over.
    leaves, rest = eqx.partition(step, eqx.is_array)

    def solve_shard(sharded, replicated, real):
        (xs, reset, mask, guess), (leaves, init, reset_state) = sharded, replicated
        shard = _Arrays(xs, init, guess, reset, reset_state, both(mask, real))
        solution = _solve(eqx.combine(leaves, rest), shard, options, throw_from)
        return solution.states, (solution.final, solution.result, solution.stats)

    sharded = arrays.xs, arrays.reset, arrays.mask, arrays.guess
    states, others = over_devices(
        time, solve_shard, sharded, (leaves, arrays.init, arrays.reset_state)
    )
    return Solution(states, *others)


def _solve(step, arrays: _Arrays, options: _Options, throw_from) -> Solution:
    """Solves a sequence, or this device's shard of it."""
    shards = choose_shards((step, arrays), None if options.time is None else options.time.axis)
    # Hoists whatever `step` closes over, so that derivative rules see it as an argument.
    step = precise(ExplainedStep(step))
    step, new, arrays = shards.convert_step(step, arrays.xs, arrays.init, arrays)
    xs, init, guess, reset, reset_state, mask = arrays
    check_new_state(new, init)
    if num_steps(xs) == 0:
        states = jtu.tree_map(lambda h: jnp.zeros((0, *h.shape), h.dtype), init)
        return Solution(states, init, RESULTS.successful, _no_stats())
    packing = None
    if mask is not None:
        check_unmasked(step, init, typed_slice(xs))
    if mask is not None and shards.is_sharded:
        xs, reset = without_moving(shards, mask, xs, reset)
    elif mask is not None:
        packing, mask = Packing(mask, shards), None
        xs, guess = packing.compact((xs, guess))
        reset = packing.resets(None if reset is None else packing.pieces(reset))
    recurrence = Recurrence(
        step,
        xs,
        init,
        resets=reset,
        reset_state=reset_state,
        structure=options.structure,
        algebra=options.algebra,
        row_shards=shards,
        mask=mask,
    )
    choice = choose(recurrence, options.solver, options.adjoint, batch=options.batch)
    forward = CheckedSolve(choice.solver, options.report, throw_from)
    states, result, stats = choice.adjoint.solve(forward, recurrence, guess)
    if packing is None:
        final = shards.from_last(jtu.tree_map(lambda h: h[-1], states))
        return Solution(states, final, *shards.replicate((result, stats)))
    return _unpacked(packing, Solution(states, init, result, stats), init, throw_from)


def _unpacked(packing: Packing, solution: Solution, init, throw) -> Solution:
    """The solution of a sequence without padding, with the padding again."""
    states = packing.expand(solution.states, init)
    final = jtu.tree_map(lambda h: h[-1], states)
    # Before the first unmasked step, they are `init`, which has not been judged.
    result = RESULTS.where(all_finite(states), solution.result, RESULTS.nonfinite)
    if throw is not None:
        final = fail_unless_successful(final, result, throw, packing.shards)
        states = jtu.tree_map(lambda h, last: h.at[-1].set(last), states, final)
    return Solution(states, final, result, solution.stats)


def _print_progress(iteration: int, correction: float, converged: int, chunks: int) -> None:
    print(
        f"iteration {iteration}: largest correction {correction:.1e} tolerances, "
        f"{converged}/{chunks} chunks at rest",
        flush=True,
    )


def _no_stats() -> Stats:
    zero = jnp.asarray(0)
    return Stats(zero, jnp.zeros((), jnp.float32), 0, zero, jnp.asarray(False))
