"""The iteration of multiple shooting: sweep, correct, judge; and the check of what is returned.

On an accelerator, a loop that turns until something holds waits for the device in every turn, to
read whether it does. So the first iterations may be made without asking, and followed by the check,
all in a row; only where the check contradicts them the loop goes on.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import once_where, place_like
from ._base import Report
from ._chunks import Chunks, Point
from ._convergence import (
    History,
    Measured,
    Vouched,
    contradicted,
    is_forgotten,
    judge,
    that_add_up,
)

# What remains of a deviation is tried with one of about this many tolerances, but at most so many
# times the defects.
_TRIED, _MOST_TIMES = 8.0, 64
# How many of the iterations that are made without asking are judged: two corrections tell a rate.
_JUDGED = 2


class Correction(NamedTuple):
    """What a method makes of a point.

    - `point`: from which the correction starts: the one that was given, or an earlier one.
    - `starts`: the corrected starts.
    - `state`: of the method, for the next correction.
    - `vouched`: what the method itself says of the correction.
    """

    point: Point
    starts: Float[Array, "chunks size"]
    state: Any
    vouched: Vouched = Vouched()


class Method(NamedTuple):
    """What the iteration asks of a solver.

    - `init`, `correct`: as those of a solver, for given chunks.
    - `quadratic`: whether it is meant to converge quadratically.
    - `max_iters`: the most iterations and checks.
    - `report`: called in every iteration, or `None`.
    """

    init: Callable[[Array], Any]
    correct: Callable[[Point, Any], Correction]
    quadratic: bool
    max_iters: int
    report: Report | None


class Progress(NamedTuple):
    """The carry of the iteration. What goes over chunks is of those of this device, if there are
    several; all else is the same on all of them."""

    iteration: Int[Array, ""]
    attempts: Int[Array, ""]  # how often the returned states were computed and judged
    starts: Float[Array, "chunks size"]
    known: Int[Array, ""]  # how many starts, but the first, are exact by induction
    change: Float[Array, "chunks size"]  # of the starts in the last iteration
    error: Float[Array, " chunks"]  # estimated, in units of the tolerance
    pending: Bool[Array, ""]  # whether any is too large
    scale: Float[Array, "chunks size"]  # of each element, once the returned states were judged
    history: History
    state: Any  # of the method

    @property
    def sweeps(self) -> Int[Array, ""]:
        return self.iteration + self.attempts


class Checked(NamedTuple):
    """The states that the starts lead to, and which chunks do not start right."""

    progress: Progress
    states: PyTree[Array]
    bad: Bool[Array, " chunks"]


def begin(method: Method, chunks: Chunks, starts: Array) -> Progress:
    progress = Progress(
        iteration=jnp.asarray(0),
        attempts=jnp.asarray(0),
        starts=starts,
        known=jnp.asarray(0),
        change=jnp.zeros_like(starts),
        error=jnp.full(chunks.num_chunks, jnp.inf, jnp.float32),
        pending=jnp.asarray(True),
        scale=jnp.zeros(starts.shape, chunks.tolerance.wide),
        history=History.none(),
        state=method.init(starts),
    )
    return place_like(progress, starts)


def run_single(chunks: Chunks, progress: Progress) -> Checked:
    """The sequential run, where there is but one chunk."""
    _, states = chunks.trajectory(progress.starts)
    history = progress.history._replace(correction=jnp.zeros((), jnp.float32))
    progress = progress._replace(
        history=history, attempts=jnp.asarray(1), pending=jnp.asarray(False)
    )
    return Checked(progress, states, jnp.zeros(1, bool))


def unchecked(chunks: Chunks, progress: Progress) -> Checked:
    """What `go_on` starts from where nothing was done yet."""
    init = chunks.recurrence.init
    empty = jtu.tree_map(lambda h: jnp.zeros((chunks.length, *h.shape), h.dtype), init)
    bad = ~chunks.is_first
    return place_like(Checked(progress, empty, bad), progress.starts)


def go_on(method: Method, chunks: Chunks, checked: Checked) -> Checked:
    """Sweeps and corrects until the starts have converged, cannot be expected to, or `max_iters`;
    and goes on if the states that they lead to contradict it."""

    def unfinished(progress: Progress) -> Bool[Array, ""]:
        within = (progress.sweeps < method.max_iters) & progress.history.is_patient
        return within & progress.pending

    def attempt(checked):
        step = functools.partial(iterate, method, chunks)
        with jax.named_scope("pararnn_iterations"):
            progress = jax.lax.while_loop(unfinished, step, checked.progress)
        return check(chunks, progress)

    def to_be_made(checked):
        progress = checked.progress
        return (progress.attempts == 0) | unfinished(progress)

    with jax.named_scope("pararnn_attempts"):
        return jax.lax.while_loop(to_be_made, attempt, checked)


def run_ahead(method: Method, chunks: Chunks, progress: Progress, iterations: int) -> Checked:
    """So many iterations, none of which is asked whether it is the last, and the check. Fewer than
    two tell nothing of an error: then the starts are taken for right until the check contradicts
    them."""
    for i in range(iterations):
        judged = i - max(0, iterations - _JUDGED)
        if judged < 0:
            progress = _correct(method, chunks, progress)[0]
        else:
            progress = iterate(method, chunks, progress, first=judged == 0)
    sure = method.quadratic and iterations >= _JUDGED
    return check(chunks, progress, ahead="sure" if sure else "doubtful")


def iterate(
    method: Method, chunks: Chunks, progress: Progress, *, first: bool | None = None
) -> Progress:
    """Sweep, correct, pin, measure, judge.

    `first` is for iterations that run ahead of any question: it tells whether this is the first one
    that is judged. They are not asked whether what remains is amplified rounding; that takes many
    reductions, and the check finds it.
    """
    last, ahead = progress, first is not None
    progress, point, vouched, pinned = _correct(method, chunks, progress)
    coarse = chunks.tolerance.coarse(progress.starts)
    scale = jnp.where(last.attempts == 0, coarse, last.scale)
    norm, beyond_rounding = chunks.tolerance.norm, chunks.tolerance.beyond_rounding
    change = progress.change
    measured = Measured(
        changes=norm(change, scale),
        beyond=norm(beyond_rounding(change, scale), scale),
        defect=jnp.max(norm(point.defects, scale)),
        # Only of use, and meant, where no rate is needed.
        persistent=method.quadratic and (ahead or chunks.is_persistent(change, last.change)),
        pinned=pinned,
    )
    error, history = judge(
        measured,
        vouched,
        last.history,
        first=jnp.asarray(first) if ahead else last.iteration == 0,
        quadratic=method.quadratic,
        scan=chunks.scan,
    )
    pending = chunks.line.any(jnp.any(error > 1))
    progress = progress._replace(error=error, pending=pending, history=history)
    if method.report is not None:
        _report(method.report, chunks, progress, measured)
    return progress


def _correct(method: Method, chunks: Chunks, progress: Progress):
    """Sweep, correct, pin: the progress, the point that was corrected, what the method says of the
    correction, and which starts are exact by induction."""
    point = chunks.sweep(progress.starts)
    point, starts, state, vouched = method.correct(point, progress.state)
    known = jnp.where(vouched.accepted, progress.known + 1, progress.known)
    pinned = chunks.line.positions(chunks.num_chunks) <= known
    starts = jnp.where(jnp.expand_dims(pinned, -1), point.arriving, starts)
    progress = progress._replace(
        iteration=progress.iteration + 1,
        starts=starts,
        known=known,
        change=starts - point.starts,
        state=state,
    )
    return progress, point, vouched, pinned


def _report(report: Report, chunks: Chunks, progress: Progress, measured: Measured) -> None:
    line = chunks.line
    at_rest = line.total(jnp.sum((measured.changes <= 1) | measured.pinned))
    call = functools.partial(_call_report, report, line.count * chunks.num_chunks)
    args = progress.iteration, progress.history.correction, at_rest
    if not line.is_cut:
        jax.debug.callback(call, *args)
    else:  # once for all devices
        jax.lax.cond(line.is_first, lambda: jax.debug.callback(call, *args), lambda: None)


def _call_report(report, num_chunks, iteration, correction, at_rest):
    report(int(iteration), float(correction), int(at_rest), num_chunks)


def check(
    chunks: Chunks, progress: Progress, *, ahead: Literal["sure", "doubtful"] | None = None
) -> Checked:
    """The states to return: one more sweep, from the final starts, which also judges them. From
    then on, elements are judged in the scale that each was found to have.

    How much of a deviation a chunk keeps is found out if it is in doubt whether defects add up.
    Ahead of any question, it is found out always, if iterations are not expected to prove the
    convergence, or never. Starts whose error no iteration has told are right, too, if what they are
    off by is forgotten.
    """
    starts, line = progress.starts, chunks.line
    ends, states = chunks.trajectory(starts)
    arriving, scale, mismatches = chunks.judged(starts, ends, states)
    norm, trusted = chunks.tolerance.norm, progress.history.trusted
    defects = arriving - starts
    norms, error = norm(defects, scale), progress.error
    beyond = norm(chunks.tolerance.beyond_rounding(defects, scale), scale)
    # Whatever is to be known of other devices, in one exchange. The first chunk of all starts where
    # it must.
    maxima = [jnp.max(jnp.where(chunks.is_first, 0, x)) for x in (norms, mismatches, error)]
    whole, before = line.across(maxima, [jnp.sum(norms), jnp.sum(beyond)])
    largest, largest_mismatch, largest_error = whole.maxima
    total = whole.sums[0]
    measure = functools.partial(_kept, chunks, starts, ends, states, defects, norms, largest, scale)
    kept = jnp.full((), jnp.inf, norms.dtype)
    proven = jnp.asarray(False)
    if ahead == "doubtful":
        kept = measure()
        right = (total == 0) | is_forgotten(largest, kept)
        proven = (progress.iteration < _JUDGED) & right
    elif ahead is None:
        doubtful = ~trusted & (total > 1)
        unknown = place_like(kept, defects)
        kept = once_where(doubtful, unknown, lambda _: measure(), "pararnn_kept")
    add_up = functools.partial(that_add_up, is_forgotten(largest, kept))

    def is_bad(norms, mismatches, error, added_up):
        contradicts = contradicted(norms, added_up, trusted)
        # Across each boundary too, a returned state must be the step of the one before it, even
        # where the step expands differences.
        return contradicts | (mismatches > 1) | ((error > 1) & ~proven)

    added_up = chunks.scan.local.cumulative_sum(add_up(norms, beyond)) + add_up(*before.sums)
    bad = is_bad(norms, mismatches, error, added_up) & ~chunks.is_first
    # What is known of other devices tells whether there is any on one of them.
    anywhere = is_bad(largest, largest_mismatch, largest_error, add_up(*whole.sums))
    pending = anywhere if line.is_cut else jnp.any(bad)
    history = progress.history
    # Without an iteration, what one would change.
    correction = jnp.where(progress.iteration == 0, largest, history.correction)
    progress = progress._replace(
        attempts=progress.attempts + 1,
        error=jnp.where(bad, jnp.inf, jnp.where(proven, 0.0, error)),
        pending=pending,
        scale=scale,
        history=history._replace(correction=correction).restarted(progress.attempts == 0),
    )
    return Checked(progress, states, bad)


def _kept(chunks: Chunks, starts, ends, states, defects, norms, largest, scale) -> Float[Array, ""]:
    """How much of a deviation is left after a chunk, or after its last steps, if only these are to
    be tried; infinite if there is none to try.

    It is tried, as a derivative may be none: with larger deviations than the defects, so that their
    own rounding does not hide it.
    """
    line = chunks.line
    factor = jnp.clip(_TRIED / largest, 1, _MOST_TIMES)
    deviated = chunks.deviated_ends(starts, states, factor.astype(defects.dtype) * defects)
    count = len(deviated)
    left = chunks.tolerance.norm(deviated - ends[:count], scale[:count])
    # The first chunk of all starts where it must. It has no defect, and may have no scale either.
    left = jnp.where(chunks.is_first[:count], 0, left)
    left, tried = line.totals([jnp.sum(left), jnp.sum(norms[:count])])
    return jnp.where(tried > 0, left / (factor * tried), jnp.inf)
