r"""The one iteration behind every method: multiple shooting over chunks of the sequence.

The sequence is cut into $C$ chunks of $T$ steps; the unknowns are the chunks' *starts*
$s_0, …, s_{C-1}$, of which $s_0$ is known. A sweep runs all chunks side by side and gives their
ends $e_c = F_c(s_c)$ and, if the method wants it, an approximation $A_c$ of $∂F_c/∂s_c$. A
correction solves the linear recurrence

$$δ_{c+1} = A_c δ_c + (e_c - s_{c+1}), \quad δ_0 = 0, \qquad s_{c+1} ← e_c + A_c δ_c.$$

By induction $s_0, …, s_k$ are exact after $k$ corrections, for *any* $A$: at most $C-1$ corrections
are needed, and a sequential finish from the first chunk that has not converged is always available.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import place_like
from .._recurrence import Recurrence
from .._settings import check_positive_int, check_tolerance
from .._solution import Stats
from ..scans import AbstractScan, LinearMethod
from ..scans._named import as_scan, default_linear_method
from ..structures import AbstractStructure
from ._affine import shoot_once
from ._base import AbstractSolver, Report, check_tangents
from ._chunks import Chunks, Point, finish_sequentially
from ._convergence import History, Measured, Vouched, contradicted, first_index, judge
from ._linearization import Linearization

# What remains of a deviation is tried with one of about this many tolerances, but at most so many
# times the defects.
_TRIED, _MOST_TIMES = 8.0, 64


class Correction(NamedTuple):
    """What a method makes of a point.

    - `point`: from which the correction starts: the one that was given, or an earlier one.
    - `starts`: the corrected starts.
    - `state`: of the method, for the next correction.
    - `vouched`: what the method itself says of the correction.
    """

    point: Point
    starts: Float[Array, "starts size"]
    state: Any
    vouched: Vouched = Vouched()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractIterativeSolver(AbstractSolver):
    """Multiple shooting: sweep all chunks from guessed starts, correct the starts, repeat.

    Subclasses choose the *linearization*, that is, which approximation of the chunks' Jacobians the
    correction uses, and a chunk size for where none is given. What else a method does in its own
    way, it may put in place of the defaults of `refine`, `init` and `correct`.

    **Arguments:**

    - `rtol`, `atol`: the iteration stops when the estimated error of every chunk's start is below
        `atol + rtol * scale`, with `scale` the largest magnitude so far in the sequence of the
        elements of a leaf that may influence each other. The returned states are then judged
        element by element, each by its own magnitude at its own time, and by what a relative
        disturbance of the states before it by `rtol` makes of it: an element is not excused by a
        larger one beside it, nor by what it was long ago. `rtol=None` is `eps ** 0.8` of the
        state's dtype (2.9e-6 in float32, 3e-13 in float64). Of a state of several dtypes, `rtol` is
        that of the widest, and the others are as many units in the last place less exact.
    - `max_iters`: the most iterations to make before the sequential finish. A check of the returned
        states that sends the iteration on counts as one.
    - `chunk_size`: how many steps a chunk has. `None` picks one from the length of the sequence and
        the structure.
    - `fallback`: whether to finish sequentially from the first chunk that did not converge. With
        `False` the result says `not_converged` instead.
    - `linear_method`: how the linear recurrence over the chunks is solved: `"sequential"`,
        `"associative"`, `"chunked"`, a scan of your own, or `None` to pick by platform.

    Raises `TypeError` or `ValueError`, naming the argument, for values out of range.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iters: int = 100
    chunk_size: int | None = None
    fallback: bool = True
    linear_method: LinearMethod | AbstractScan | None = None

    def __post_init__(self):
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)
        check_tolerance("atol", self.atol)
        check_positive_int("max_iters", self.max_iters)
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        if not isinstance(self.fallback, bool):
            raise TypeError(f"`fallback` must be True or False; got {self.fallback!r}.")
        as_scan("linear_method", self.linear_method)

    # Whether corrections are shortened, so that they do not converge quadratically even with the
    # exact Jacobians.
    damped: ClassVar[bool] = False

    @abc.abstractmethod
    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        """What to use of the Jacobians of `size` state elements that have `structure`."""

    @abc.abstractmethod
    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        """The chunk size that `chunk_size=None` stands for, given the length of the sequence and
        the number of state elements."""

    def refine(
        self, chunks: Chunks, starts: Float[Array, "starts size"]
    ) -> tuple[Float[Array, "starts size"], int]:
        """Improves the guessed starts before the iteration, at the cost of a number of steps, which
        is returned with them. By default, it does nothing."""
        return starts, 0

    def init(self, chunks: Chunks, starts: Float[Array, "starts size"]) -> Any:
        """What the method carries from correction to correction: a pytree of arrays. By default,
        nothing."""
        return None

    def correct(self, chunks: Chunks, point: Point, state: Any) -> Correction:
        """The starts that follow from a sweep. By default, the linear recurrence over the chunks
        with the linearization's matrices."""
        return Correction(point, chunks.correct(point)[0], state)

    def finishing(self) -> "AbstractIterativeSolver":
        return dataclasses.replace(self, fallback=True)

    def resolved(
        self, recurrence: Recurrence, platform: str | None = None
    ) -> "AbstractIterativeSolver":
        length, chunk_size = recurrence.length, self.chunk_size
        if chunk_size is None:
            chunk_size = self.default_chunk_size(recurrence.structure, length, recurrence.size)
        method = self.linear_method
        if method is None:
            num_chunks = -(-length // min(chunk_size, length))
            method = default_linear_method(num_chunks, platform)
        return dataclasses.replace(self, chunk_size=chunk_size, linear_method=method)

    def solve(
        self, recurrence: Recurrence, guess: PyTree[Array] | None, report: Report | None = None
    ) -> tuple[PyTree[Array], Bool[Array, ""], Stats]:
        chunks = self._cut(recurrence)
        if chunks.linearization.propagated is not None:
            check_tangents(self, recurrence)
        starts, steps = self.refine(chunks, chunks.guess(guess))
        progress, states, bad = _shoot(self, chunks, starts, report)
        first_step = chunks.chunk_size * (1 + first_index(bad))
        finished = jnp.asarray(0)
        if self.fallback:
            finished = jnp.maximum(chunks.length - first_step, 0)
            states = finish_sequentially(recurrence, states, first_step, chunks.chunk_size)
        stats = Stats(
            iterations=progress.iteration,
            correction=progress.history.correction,
            chunk_size=chunks.chunk_size,
            sequential_steps=steps + progress.sweeps * chunks.chunk_size + finished,
            fallback=finished > 0,
        )
        return states, self.fallback | ~jnp.any(bad), stats

    def solve_affine(self, recurrence: Recurrence) -> PyTree[Array]:
        """With the exact Jacobian, one correction from any starts is the solution."""
        chunks = self._cut(recurrence)
        if self._is_quadratic(chunks):
            return shoot_once(chunks)
        return self.finishing().solve(recurrence, None)[0]

    def _is_quadratic(self, chunks: Chunks) -> bool:
        return chunks.linearization.exact and not self.damped

    def _cut(self, recurrence: Recurrence) -> Chunks:
        solver = self.resolved(recurrence)
        assert solver.chunk_size is not None
        return Chunks(
            recurrence,
            self.linearization(recurrence.structure, recurrence.size),
            solver.chunk_size,
            as_scan("linear_method", solver.linear_method),
            self.rtol,
            self.atol,
        )


# --- the iteration ----------------------------------------------------------------------------


class _Progress(NamedTuple):
    """The carry of the iteration. What goes over starts leaves out chunk 0, whose start is
    known."""

    iteration: Int[Array, ""]
    attempts: Int[Array, ""]  # how often the returned states were computed and judged
    starts: Float[Array, "starts size"]
    known: Int[Array, ""]  # how many starts are exact by induction
    change: Float[Array, "starts size"]  # of the starts in the last iteration
    error: Float[Array, " starts"]  # estimated, in units of the tolerance
    scale: Float[Array, "starts size"]  # of each element, once the returned states were judged
    history: History
    state: Any  # of the method

    @property
    def sweeps(self) -> Int[Array, ""]:
        return self.iteration + self.attempts


def _shoot(
    solver: AbstractIterativeSolver, chunks: Chunks, starts: Array, report: Report | None
) -> tuple[_Progress, PyTree[Array], Bool[Array, " starts"]]:
    """Sweeps and corrects until the starts have converged, cannot be expected to, or `max_iters`;
    and goes on if the states that they lead to contradict it. Returns these states, and which
    chunks but the first do not start right."""

    def unfinished(progress: _Progress) -> Bool[Array, ""]:
        within = (progress.sweeps < solver.max_iters) & progress.history.is_patient
        return within & jnp.any(progress.error > 1)

    def attempt(carry):
        iterate = functools.partial(_iterate, solver, chunks, report)
        with jax.named_scope("pararnn_iterations"):
            progress = jax.lax.while_loop(unfinished, iterate, carry[0])
        return _check(chunks, progress)

    def to_be_made(carry):
        progress, _, _ = carry
        return (progress.attempts == 0) | unfinished(progress)

    progress = _begin(solver, chunks, starts)
    if chunks.num_chunks == 1:  # the sequential run
        _, states = chunks.trajectory(starts)
        history = progress.history._replace(correction=jnp.zeros((), jnp.float32))
        progress = progress._replace(history=history, attempts=jnp.asarray(1))
        return progress, states, jnp.ones(0, bool)
    init = chunks.recurrence.init
    empty = jtu.tree_map(lambda h: jnp.zeros((chunks.length, *h.shape), h.dtype), init)
    bad = jnp.ones(chunks.num_chunks - 1, bool)
    carry = place_like((progress, empty, bad), starts)
    with jax.named_scope("pararnn_attempts"):
        return jax.lax.while_loop(to_be_made, attempt, carry)


def _begin(solver: AbstractIterativeSolver, chunks: Chunks, starts: Array) -> _Progress:
    progress = _Progress(
        iteration=jnp.asarray(0),
        attempts=jnp.asarray(0),
        starts=starts,
        known=jnp.asarray(0),
        change=jnp.zeros_like(starts),
        error=jnp.full(chunks.num_chunks - 1, jnp.inf, jnp.float32),
        scale=jnp.zeros_like(chunks.tolerance.coarse(starts)),
        history=History.none(),
        state=solver.init(chunks, starts),
    )
    return place_like(progress, starts)


def _iterate(
    solver: AbstractIterativeSolver, chunks: Chunks, report: Report | None, progress: _Progress
) -> _Progress:
    """Sweep, correct, pin, measure, judge."""
    point = chunks.sweep(progress.starts)
    point, starts, state, vouched = solver.correct(chunks, point, progress.state)
    known = jnp.where(vouched.accepted, progress.known + 1, progress.known)
    pinned = jnp.arange(chunks.num_chunks - 1) < known
    starts = jnp.where(jnp.expand_dims(pinned, -1), point.ends[:-1], starts)
    change, coarse = starts - point.starts, chunks.tolerance.coarse(starts)
    scale = jnp.where(progress.attempts == 0, coarse, progress.scale)
    norm, beyond_rounding = chunks.tolerance.norm, chunks.tolerance.beyond_rounding
    quadratic = solver._is_quadratic(chunks)
    measured = Measured(
        changes=norm(change, scale),
        beyond=norm(beyond_rounding(change, scale), scale),
        defect=jnp.max(norm(point.defects, scale)),
        # Only of use, and meant, where no rate is needed.
        persistent=quadratic and chunks.is_persistent(change, progress.change),
        pinned=pinned,
    )
    error, history = judge(
        measured,
        vouched,
        progress.history,
        first=progress.iteration == 0,
        quadratic=quadratic,
        scan=chunks.scan,
    )
    progress = progress._replace(
        iteration=progress.iteration + 1,
        starts=starts,
        known=known,
        change=change,
        error=error,
        history=history,
        state=state,
    )
    if report is not None:
        _report(report, progress, measured)
    return progress


def _report(report: Report, progress: _Progress, measured: Measured) -> None:
    at_rest = 1 + jnp.sum((measured.changes <= 1) | measured.pinned)
    chunks = 1 + len(measured.changes)
    call = functools.partial(_call_report, report, chunks)
    jax.debug.callback(call, progress.iteration, progress.history.correction, at_rest)


def _call_report(report, num_chunks, iteration, correction, at_rest):
    report(int(iteration), float(correction), int(at_rest), num_chunks)


def _check(
    chunks: Chunks, progress: _Progress
) -> tuple[_Progress, PyTree[Array], Bool[Array, " starts"]]:
    """The states to return: one more sweep, from the final starts, which also judges them. From
    then on, elements are judged in the scale that each was found to have."""
    ends, states = chunks.trajectory(progress.starts)
    scale = chunks.fine_scale(progress.starts, ends)
    norm, trusted = chunks.tolerance.norm, progress.history.trusted
    defects = ends[:-1] - progress.starts
    norms = norm(defects, scale)
    beyond = norm(chunks.tolerance.beyond_rounding(defects, scale), scale)
    doubtful = ~trusted & (chunks.scan.cumulative_sum(norms)[-1] > 1)
    kept = _kept(chunks, progress.starts, ends, norms, scale, doubtful)
    bad = (progress.error > 1) | contradicted(norms, beyond, kept, trusted, chunks.scan)
    # Across each boundary too, a returned state must be the step of the one before it, even where
    # the step expands differences.
    bad |= chunks.mismatches(states) > 1
    progress = progress._replace(
        attempts=progress.attempts + 1,
        error=jnp.where(bad, jnp.inf, progress.error),
        scale=scale,
        history=progress.history.restarted(progress.attempts == 0),
    )
    return progress, states, bad


def _kept(chunks: Chunks, starts, ends, norms, scale, doubtful) -> Float[Array, ""]:
    """How much of a deviation is left after a chunk; infinite unless it is `doubtful`.

    It is tried, as a derivative may be none: with larger deviations than the defects, so that their
    own rounding does not hide it. A loop of one turn or none: under `vmap`, a `cond` would copy the
    weights for each sequence.
    """
    defects = ends[:-1] - starts

    def measure(carry):
        factor = jnp.clip(_TRIED / jnp.max(norms), 1, _MOST_TIMES)
        tried = starts + factor.astype(defects.dtype) * defects
        pushed = chunks.ends(jnp.concatenate([chunks.first_start, tried]))[1:] - ends[1:]
        kept = jnp.sum(chunks.tolerance.norm(pushed, scale)) / (factor * jnp.sum(norms))
        return jnp.zeros_like(carry[0]), kept

    unknown = place_like((doubtful, jnp.full((), jnp.inf, norms.dtype)), defects)
    with jax.named_scope("pararnn_kept"):
        return jax.lax.while_loop(lambda carry: carry[0], measure, unknown)[1]
