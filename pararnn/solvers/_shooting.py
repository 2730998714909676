r"""The one iteration behind every method: multiple shooting over chunks of the sequence.

The sequence is cut into $C$ chunks of $T$ steps; the unknowns are the chunks' *starts*
$s_0, …, s_{C-1}$, of which $s_0$ is known. A sweep runs all chunks side by side and gives their
ends $e_c = F_c(s_c)$ and, if the method wants it, an approximation $A_c$ of $∂F_c/∂s_c$. A
correction solves the linear recurrence

$$δ_{c+1} = A_c δ_c + (e_c - s_{c+1}), \quad δ_0 = 0, \qquad s_{c+1} ← e_c + A_c δ_c.$$

By induction $s_0, …, s_k$ are exact after $k$ corrections, for *any* $A$: at most $C-1$ corrections
are needed, and a sequential finish from the first chunk that has not converged is always available.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import place_like
from .._linear import linear_recurrence
from .._misc import all_finite, bool_where
from .._solution import Stats
from .._structure import AbstractStructure
from ._base import AbstractIterativeSolver
from ._chunks import Chunks, Step, finish_sequentially, first_index
from ._damped import LevenbergMarquardt

# A correction beyond this many tolerances may still be a transient, whose rate tells nothing.
_EXTRAPOLATE_BELOW = 100.0
# Corrections up to this many tolerances may be rounding, amplified by a system that is close to the
# edge of stability.
_AMPLIFIED_ROUNDING = 10.0
# Give up after this many iterations in which no more than the guaranteed chunk became right and the
# corrections of the others did not shrink either.
_PATIENCE = 15
# What remains of a deviation is tried with one of about this many tolerances.
_TRIED = 8.0
# From this length on, the rounding of the products that a linear recurrence is solved by is
# corrected; a sequential one has no products.
_REFINED_FROM = {"associative": 1024, "chunked": 16_384, "sequential": math.inf}
# Adaptive damping: where it starts, how it changes when a correction is accepted or rejected, and
# below which value the correction is Newton's for the purpose of judging convergence.
_FIRST_DAMPING, _DAMPING_DOWN, _DAMPING_UP, _MIN_DAMPING, _NEARLY_UNDAMPED = (
    1e-2,
    0.1,
    4.0,
    1e-8,
    1e-5,
)


class _Point(NamedTuple):
    """Starts with what a sweep found there, and the sum of squared defects."""

    starts: Float[Array, "starts size"]
    ends: Float[Array, "chunks size"]
    jacobians: Float[Array, "chunks *matrix"] | None
    merit: Float[Array, ""]


class _Progress(NamedTuple):
    """The carry of the iteration. `starts` and `error` leave out chunk 0, whose start is known."""

    iteration: Int[Array, ""]
    attempts: Int[Array, ""]  # how often the returned states were computed and judged
    starts: Float[Array, "starts size"]
    known: Int[Array, ""]  # how many starts are exact by induction
    error: Float[Array, " starts"]  # estimated, in units of the tolerance
    correction: Float[Array, ""]  # largest of the last iteration, in units of the tolerance
    total: Float[Array, ""]  # sum of the corrections of all chunks
    front: Int[Array, ""]  # the first start that the last iteration still moved
    level: Float[Array, ""]  # mean logarithm of the corrections, the smallest so far
    stalled: Int[Array, ""]
    change: Float[Array, "starts size"]  # of the starts in the last iteration
    proven: Bool[Array, ""]  # whether some correction removed nine tenths of the defects
    trusted: Bool[Array, ""]  # whether the corrections themselves prove the convergence
    scale: Float[Array, "starts size"]  # of each element, once the returned states were judged
    damping: Float[Array, ""]
    best: _Point | None  # the last accepted point, for adaptive damping


def multiple_shooting(
    step: Step,
    xs: PyTree[Array],
    init: PyTree[Array],
    guess: PyTree[Array] | None,
    *,
    solver: AbstractIterativeSolver,
    structure: AbstractStructure,
    report: Callable[[int, float, int, int], Any] | None = None,
) -> tuple[PyTree[Array], Bool[Array, ""], Stats]:
    """Solves a recurrence of at least one step by iterating from `guess`.

    **Arguments:**

    - `step`, `xs`, `init`: the recurrence.
    - `guess`: states to start from, shaped like the result, or `None`.
    - `solver`: the method.
    - `structure`: the structure of the step's Jacobian.
    - `report`: called with `(iteration, correction, chunks at rest, chunks)` in every iteration.

    **Returns:**

    `(states, converged, stats)`.
    """
    chunks = Chunks(step, xs, init, solver, structure)
    starts, refinement_steps = solver.refine(chunks, chunks.guess(guess))
    unfinished, iterate, progress = _iteration(chunks, starts, solver, report)

    def attempt(carry):
        progress, _, _ = carry
        progress = jax.lax.while_loop(unfinished, iterate, progress)
        # The returned states: one more sweep, from the final starts, which also judges them.
        ends, states = chunks.trajectory(progress.starts)
        scale = chunks.fine_scale(progress.starts, ends)
        bad = (progress.error > 1) | _off(chunks, progress, ends, scale)
        # Across each boundary too, a returned state must be the step of the one before it, even
        # where the step expands differences.
        bad |= chunks.mismatches(states) > 1
        return _judged(progress, bad, scale), states, bad

    def contradicted(carry):
        progress, _, _ = carry
        return (progress.attempts == 0) | unfinished(progress)

    bad = jnp.ones(chunks.num_chunks - 1, bool)
    if chunks.num_chunks == 1:  # the sequential run
        _, states = chunks.trajectory(starts)
        none = jnp.zeros_like(progress.correction)
        progress = progress._replace(correction=none, attempts=jnp.asarray(1))
    else:
        empty = jtu.tree_map(lambda h: jnp.zeros((chunks.length, *h.shape), h.dtype), init)
        progress, states, bad = jax.lax.while_loop(
            contradicted, attempt, place_like((progress, empty, bad), starts)
        )
    first_step = chunks.chunk_size * (1 + first_index(bad))
    finished = jnp.asarray(0)
    if solver.fallback:
        finished = jnp.maximum(chunks.length - first_step, 0)
        states = finish_sequentially(step, xs, states, init, first_step, chunks.chunk_size)
    stats = Stats(
        iterations=progress.iteration,
        correction=progress.correction,
        chunk_size=chunks.chunk_size,
        sequential_steps=refinement_steps
        + (progress.iteration + progress.attempts) * chunks.chunk_size
        + finished,
        fallback=finished > 0,
    )
    return states, solver.fallback | ~jnp.any(bad), stats


def linear_shooting(
    step: Step,
    xs: PyTree[Array],
    init: PyTree[Array],
    *,
    solver: AbstractIterativeSolver,
    structure: AbstractStructure,
) -> PyTree[Array]:
    """As `multiple_shooting` for a `step` that is affine in the state, starting from zero: with the
    exact Jacobian, one correction from any starts is the solution."""
    chunks = Chunks(step, xs, init, solver, structure)
    if not chunks.quadratic:
        return multiple_shooting(step, xs, init, None, solver=solver, structure=structure)[0]
    starts = jnp.zeros((chunks.num_chunks - 1, chunks.size), chunks.dtype)
    ends, jacobians = chunks.sweep(starts)
    if chunks.chunk_size == 1:
        assert jacobians is not None  # an exact method has a linearization
        solution = linear_recurrence(structure, jacobians, ends, method=chunks.linear_method)
        if chunks.length >= _REFINED_FROM[chunks.linear_method]:
            # The rounding of products grows with their length: once more, for what is missing.
            starts = solution[:-1]
            starts, _ = chunks.correct(starts, *chunks.sweep(starts))
            _, states = chunks.trajectory(starts)
        else:
            states = jax.vmap(chunks.unravel)(solution)
        if chunks.linear_method == "sequential":
            return states
        first_step = first_index(~all_finite(states, keep_axes=1))
    else:
        starts, replaced = chunks.correct(starts, ends, jacobians)
        _, states = chunks.trajectory(starts)
        first_step = chunks.chunk_size * (1 + first_index(replaced))
    # A product of matrices may overflow where the products with the vector do not.
    return finish_sequentially(step, xs, states, init, first_step, chunks.chunk_size)


def _iteration(
    chunks: Chunks,
    starts: Array,
    solver: AbstractIterativeSolver,
    report: Callable[[int, float, int, int], Any] | None,
):
    """The condition, the body and the initial carry of the loop that sweeps and corrects until the
    starts have converged, cannot be expected to, or `max_iters`."""

    adaptive = isinstance(solver, LevenbergMarquardt) and solver.damping is None

    def iterate(progress: _Progress) -> _Progress:
        ends, jacobians = chunks.sweep(progress.starts)
        point = _Point(progress.starts, ends, jacobians, _merit(progress.starts, ends))
        accepted, damping = jnp.asarray(True), progress.damping
        if adaptive:
            assert progress.best is not None
            accepted = point.merit < progress.best.merit
            point = bool_where(accepted, point, progress.best)
            factor = jnp.where(accepted, _DAMPING_DOWN, _DAMPING_UP)
            damping = jnp.clip(damping * factor.astype(damping.dtype), _MIN_DAMPING, 1e6)
        starts, _ = chunks.correct(
            point.starts, point.ends, point.jacobians, damping if chunks.damped else None
        )
        known = jnp.where(accepted, progress.known + 1, progress.known)
        guaranteed = jnp.arange(chunks.num_chunks - 1) < known
        starts = jnp.where(jnp.expand_dims(guaranteed, -1), point.ends[:-1], starts)
        change = starts - point.starts
        norm, beyond_rounding = chunks.tolerance.norm, chunks.tolerance.beyond_rounding
        first_time = progress.attempts == 0
        scale = jnp.where(first_time, chunks.tolerance.coarse(starts), progress.scale)
        changes = norm(change, scale)
        correction = jnp.max(changes)
        # At the observed rate, the corrections to come form a geometric series. A chunk is as wrong
        # as what arrives from the chunks before it, which adds up where the linearization does not
        # carry it along. Not even Newton's method is trusted to converge quadratically: the
        # structure may be declared wrongly, a custom derivative may not be one.
        total = jnp.sum(changes)
        rate = correction / progress.correction
        if chunks.quadratic:
            arriving = jax.lax.cummax(changes)
        else:
            rate = jnp.maximum(rate, total / progress.total)
            arriving = jnp.cumsum(norm(beyond_rounding(change, scale), scale))
        usable = (progress.iteration > 0) & (rate < 1) & (correction <= _EXTRAPOLATE_BELOW)
        if adaptive:
            usable &= accepted & (damping <= _NEARLY_UNDAMPED)
        error = jnp.where(usable, arriving * rate / (1 - rate), jnp.inf)
        converged = total == 0
        # Near the edge of stability, Newton's corrections are amplified rounding and never settle.
        # Rounding has no direction, but neither has the drift of a derivative that is not one
        # (`stop_gradient`): so the linearization must have proved itself on a larger correction.
        defect = jnp.max(norm(point.ends[:-1] - point.starts, scale))
        consistent = defect <= 1
        large = jnp.isfinite(progress.correction) & (progress.correction >= _AMPLIFIED_ROUNDING)
        proven = progress.proven | (large & (defect <= 0.1 * progress.correction))
        small = (progress.iteration > 0) & accepted & (correction <= _AMPLIFIED_ROUNDING)
        trusted = jnp.zeros_like(progress.trusted)
        if chunks.quadratic:
            noise = consistent & small & ~chunks.is_persistent(change, progress.change)
            # Corrections so small that even their sum over all chunks is below the tolerance.
            negligible = (progress.iteration > 0) & (total <= 1)
            converged |= (noise & proven) | negligible
            error = jnp.where(converged | guaranteed, 0.0, error)
            # Or all of them rounding. Whether that adds up, the check of the returned states finds.
            trusted = jnp.all(error <= 1)
            rest = jnp.all(norm(beyond_rounding(change, scale), scale) == 0)
            converged |= (progress.iteration > 0) & accepted & rest
        error = jnp.where(converged | guaranteed, 0.0, error)
        front = first_index((changes > 1) & ~guaranteed)
        logs = jnp.where(guaranteed, 0.0, jnp.log(jnp.clip(changes, 1.0, 1e30)))
        level = jnp.sum(logs) / jnp.maximum(jnp.sum(~guaranteed, dtype=logs.dtype), 1)
        better = (level < progress.level - 0.05) | (front > progress.front + 1)
        if adaptive:
            better |= accepted
        if report is not None:
            at_rest = 1 + jnp.sum((changes <= 1) | guaranteed)
            jax.debug.callback(
                functools.partial(_call_report, report, chunks.num_chunks),
                progress.iteration + 1,
                correction,
                at_rest,
            )
        return _Progress(
            iteration=progress.iteration + 1,
            attempts=progress.attempts,
            starts=starts,
            known=known,
            error=error,
            correction=correction,
            total=total,
            front=front,
            level=jnp.minimum(level, progress.level),
            stalled=jnp.where(better, 0, progress.stalled + 1),
            change=change,
            proven=proven,
            trusted=trusted,
            scale=progress.scale,
            damping=damping,
            best=point if adaptive else None,
        )

    def unfinished(progress: _Progress) -> Bool[Array, ""]:
        sweeps = progress.iteration + progress.attempts
        within = (sweeps < solver.max_iters) & (progress.stalled < _PATIENCE)
        return within & jnp.any(progress.error > 1)

    infinite = jnp.asarray(jnp.inf, jnp.float32)
    damping, best = 0.0, None
    if isinstance(solver, LevenbergMarquardt):
        damping = _FIRST_DAMPING if solver.damping is None else solver.damping
    if adaptive:
        ends, jacobians = jax.eval_shape(chunks.sweep, starts)
        empty = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), (starts, ends, jacobians))
        best = _Point(*empty, merit=jnp.asarray(jnp.inf, starts.dtype))
    progress = _Progress(
        iteration=jnp.asarray(0),
        attempts=jnp.asarray(0),
        starts=starts,
        known=jnp.asarray(0),
        error=jnp.full(chunks.num_chunks - 1, jnp.inf, jnp.float32),
        correction=infinite,
        total=infinite,
        front=jnp.asarray(0),
        level=infinite,
        stalled=jnp.asarray(0),
        change=jnp.zeros_like(starts),
        proven=jnp.asarray(False),
        trusted=jnp.asarray(False),
        scale=jnp.zeros_like(chunks.tolerance.coarse(starts)),
        damping=jnp.asarray(damping, starts.dtype),
        best=best,
    )
    return unfinished, iterate, place_like(progress, starts)


def _call_report(report, num_chunks, iteration, correction, at_rest):
    report(int(iteration), float(correction), int(at_rest), num_chunks)


def _merit(starts: Array, ends: Array) -> Float[Array, ""]:
    """The sum of squared defects; infinite if any is not finite."""
    merit = jnp.sum(jnp.square(ends[:-1] - starts))
    return jnp.where(jnp.isfinite(merit), merit, jnp.inf)


def _judged(progress: _Progress, bad: Bool[Array, " starts"], scale: Array) -> _Progress:
    """The progress after the returned states were judged. From now on, elements are judged in the
    scale that each was found to have, and patience starts anew."""
    first_time = progress.attempts == 0
    infinite = jnp.asarray(jnp.inf, jnp.float32)
    return progress._replace(
        error=jnp.where(bad, jnp.inf, progress.error),
        attempts=progress.attempts + 1,
        scale=scale,
        front=jnp.where(first_time, 0, progress.front),
        level=jnp.where(first_time, infinite, progress.level),
        stalled=jnp.where(first_time, 0, progress.stalled),
        proven=progress.proven & ~first_time,
    )


def _off(chunks: Chunks, progress: _Progress, ends: Array, scale: Array) -> Bool[Array, " starts"]:
    """Which of the final starts the last sweep contradicts."""
    norm = chunks.tolerance.norm
    defects = ends[:-1] - progress.starts
    norms = norm(defects, scale)
    # A slow mode may hide behind a fast one, whose rate is no guide then; but as long as chunks do
    # not expand, a chunk is no further off than the sum of the defects before it.
    reached = jnp.cumsum(norms)

    def measure(carry):
        # How much is kept is tried, as a derivative may be none: with larger deviations, so that
        # their own rounding does not hide it.
        factor = jnp.clip(_TRIED / jnp.max(norms), 1, 64)
        tried = progress.starts + factor.astype(defects.dtype) * defects
        tried = jnp.concatenate([chunks.first_start, tried])
        pushed = chunks.ends(tried)[1:] - ends[1:]
        kept = jnp.sum(norm(pushed, scale)) / (factor * jnp.sum(norms))
        return jnp.zeros_like(carry[0]), kept

    # Where chunks forget, rounding does not add up to more than a geometric series. A system that
    # does not forget carries every defect on, a drift of a few units in the last place too. A loop
    # of one turn or none: under `vmap`, a `cond` would copy the weights for each sequence.
    doubtful = ~progress.trusted & (reached[-1] > 1)
    unknown = place_like((doubtful, jnp.full((), jnp.inf, norms.dtype)), defects)
    _, kept = jax.lax.while_loop(lambda carry: carry[0], measure, unknown)
    rounding = (kept < 1) & (jnp.max(norms) / (1 - kept) <= 1)
    beyond = jnp.cumsum(norm(chunks.tolerance.beyond_rounding(defects, scale), scale))
    added_up = jnp.where(rounding, beyond, reached) > 1
    return (norms > 1) | (added_up & ~progress.trusted)
