"""The iteration of multiple shooting: sweep, judge, correct; and the trajectory that is returned.

On an accelerator, a loop with a condition waits for the device in every turn, to read the
condition. So a fixed number of iterations may come first, followed by the trajectory and its
verdict, all in a row; the loop runs only if this verdict does not accept the trajectory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._base import Report
from ._chunks import Chunks, Point
from ._convergence import Progress, StepReport, summarize
from ._verdict import GOLDEN, Verdict, is_wrong, judge

# The trajectory is computed by another program than the sweeps that were judged, with roundings of
# its own: its defects may be this many times the tolerance.
_SLACK = 2.0


class Correction(NamedTuple):
    """A corrected point.

    - `point`: from which the correction starts: the one that was given, or an earlier one.
    - `starts`: the corrected starts.
    - `state`: of the method, for the next correction.
    - `step_report`: what the method itself reports about the correction.
    - `propagated`: `chunks.propagate_defects(point)`, if the starts are `point.incoming` and that.
    """

    point: Point
    starts: Float[Array, "chunks size"]
    state: Any
    step_report: StepReport = StepReport()
    propagated: Float[Array, "chunks size"] | None = None


class Method(NamedTuple):
    """A solver as the iteration sees it.

    - `init`, `correct`: as those of a solver, for given chunks.
    - `max_iters`: the most iterations.
    - `report`: called in every iteration, or `None`.
    """

    init: Callable[[Array], Any]
    correct: Callable[[Point, Any], Correction]
    max_iters: int
    report: Report | None


class Iterate(NamedTuple):
    """The carry of the iteration. Arrays over chunks are those of this device, if there are
    several; all else is the same on all of them."""

    iteration: Int[Array, ""]
    starts: Float[Array, "chunks size"]
    num_exact: Int[Array, ""]  # starts, but the first, that are exact by induction
    defects: Float[Array, "chunks size"]  # of the last sweep
    verdict: Verdict  # on the starts of the last sweep
    pending: Bool[Array, ""]  # whether any of them was not accepted
    progress: Progress
    state: Any  # of the method


class Trajectory(NamedTuple):
    """The states that the starts lead to, and which chunks do not start right."""

    iterate: Iterate
    states: PyTree[Array]
    bad: Bool[Array, " chunks"]
    pending: Bool[Array, ""]  # whether any chunk is bad


def init_iterate(method: Method, chunks: Chunks, starts: Float[Array, "chunks size"]) -> Iterate:
    """The iterate before the first iteration, from guessed starts."""
    iterate = Iterate(
        iteration=jnp.asarray(0),
        starts=starts,
        num_exact=jnp.asarray(0),
        defects=_any_direction(starts),
        verdict=Verdict.none(chunks),
        pending=jnp.asarray(True),
        progress=Progress.none(),
        state=method.init(starts),
    )
    return chunks.shards.place_like(iterate, starts)


def _any_direction(starts: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
    """Numbers close to zero, of both signs."""
    signs = np.where(np.arange(starts.shape[1]) * GOLDEN % 1 < 0.5, -1.0, 1.0)
    tiny = float(jnp.finfo(starts.dtype).tiny)
    return jnp.broadcast_to(jnp.asarray(tiny * signs, starts.dtype), starts.shape)


def iterate_until_accepted(method: Method, chunks: Chunks, iterate: Iterate) -> Trajectory:
    """Sweeps and corrects until the starts are accepted, cannot be expected to, or `max_iters`."""

    def unfinished(iterate: Iterate) -> Bool[Array, ""]:
        within = (iterate.iteration < method.max_iters) & iterate.progress.is_patient
        return within & iterate.pending

    turn = functools.partial(_judged_iteration, method, chunks)
    with jax.named_scope("pararnn_iterations"):
        iterate = chunks.shards.while_loop(unfinished, turn, iterate)
    point, states = _trajectory(chunks, iterate.starts)
    norm = chunks.tolerance.norm(point.defects, iterate.verdict.scale)
    bad = (iterate.verdict.errors > 1) | (norm > _SLACK)
    return _returned(chunks, iterate, states, bad)


def iterate_fixed(method: Method, chunks: Chunks, iterate: Iterate, iterations: int) -> Trajectory:
    """A fixed number of iterations without a verdict, and the trajectory with one."""

    def turn(_, carry):
        iterate, _ = carry
        point = chunks.sweep(iterate.starts)
        iterate, _ = _corrected(chunks, iterate, point, method.correct(point, iterate.state))
        return iterate, point.jacobians

    jacobians = None
    if iterations:
        iterate, jacobians = jax.lax.fori_loop(1, iterations, turn, turn(0, (iterate, None)))
    point, states = _trajectory(chunks, iterate.starts)
    point = point._replace(jacobians=jacobians)  # close to those that a last sweep would find
    defects = iterate.defects if iterations else point.defects
    verdict = judge(chunks, point, chunks.propagate_defects(point), defects, states)
    return _returned(chunks, iterate._replace(verdict=verdict), states, verdict.errors > 1)


def single_chunk(chunks: Chunks, iterate: Iterate) -> Trajectory:
    """The sequential run, where there is but one chunk."""
    _, states = _trajectory(chunks, iterate.starts)
    verdict = iterate.verdict._replace(correction=jnp.zeros((), jnp.float32))
    return _returned(chunks, iterate._replace(verdict=verdict), states, jnp.zeros(1, bool))


def _judged_iteration(method: Method, chunks: Chunks, iterate: Iterate) -> Iterate:
    point = chunks.sweep(iterate.starts)
    correction = method.correct(point, iterate.state)
    propagated = correction.propagated
    if propagated is None:
        propagated = chunks.propagate_defects(point)
    verdict = judge(
        chunks,
        point,
        propagated,
        iterate.defects,
        previous=iterate.verdict,
        iteration=iterate.iteration,
    )
    corrected, pinned = _corrected(chunks, iterate, point, correction)
    errors = jnp.where(pinned, 0, verdict.errors)
    summary = summarize(errors, verdict.correction, pinned, chunks.shards)
    # The first sweep has no defects before it, to measure memory in their direction.
    accepted = summary.largest <= (iterate.iteration > 0).astype(jnp.float32)
    if correction.propagated is None:  # a correction of another kind might leave what was accepted
        starts = chunks.safeguarded(point, point.incoming + propagated)
        corrected = corrected._replace(starts=jnp.where(accepted, starts, corrected.starts))
    descended = correction.step_report.descended
    iterate = corrected._replace(
        verdict=verdict._replace(errors=errors, correction=summary.correction),
        pending=~accepted,
        progress=iterate.progress.updated(summary.front, summary.level, descended),
    )
    if method.report is not None:
        _report(method.report, chunks, iterate)
    return iterate


def _corrected(
    chunks: Chunks, iterate: Iterate, point: Point, correction: Correction
) -> tuple[Iterate, Bool[Array, " chunks"]]:
    """The corrected starts, and which of them are pinned because they are exact by induction."""
    num_exact = iterate.num_exact + jnp.asarray(correction.step_report.accepted).astype(int)
    pinned = chunks.shards.positions(chunks.num_chunks) <= num_exact
    starts = jnp.where(jnp.expand_dims(pinned, -1), correction.point.incoming, correction.starts)
    iterate = iterate._replace(
        iteration=iterate.iteration + 1,
        starts=starts,
        num_exact=num_exact,
        defects=point.defects,
        state=correction.state,
    )
    return iterate, pinned


def _trajectory(chunks: Chunks, starts: Array) -> tuple[Point, PyTree[Array]]:
    """One more sweep, which keeps all states."""
    ends, states = chunks.trajectory(starts)
    return Point(starts, ends, chunks.incoming(ends), None), states


def _returned(chunks: Chunks, iterate: Iterate, states: PyTree[Array], bad: Array) -> Trajectory:
    if not chunks.sweep_method.plain:  # a sweep that errs anywhere may err everywhere
        bad |= is_wrong(chunks, iterate.starts, states)
    verdict = iterate.verdict
    maxima = [jnp.max(bad.astype(jnp.float32)), verdict.correction]
    pending, correction = chunks.shards.reduce(maxima, []).maxima
    iterate = iterate._replace(verdict=verdict._replace(correction=correction))
    return Trajectory(iterate, states, bad, pending > 0)


def _report(report: Report, chunks: Chunks, iterate: Iterate) -> None:
    shards, verdict = chunks.shards, iterate.verdict
    at_rest = shards.psum(jnp.sum(verdict.errors <= 1))
    call = functools.partial(_call_report, report, shards.count * chunks.num_chunks)
    args = iterate.iteration, verdict.correction, at_rest
    if not shards.is_sharded:
        jax.debug.callback(call, *args)
    else:  # once for all devices
        jax.lax.cond(shards.is_first, lambda: jax.debug.callback(call, *args), lambda: None)


def _call_report(report, num_chunks, iteration, correction, at_rest):
    report(int(iteration), float(correction), int(at_rest), num_chunks)
