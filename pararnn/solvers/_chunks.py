"""A recurrence cut into chunks: sweeps over them, their judgement, and their correction."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._devices import place_like
from .._misc import finite_or, make_ravel
from .._recurrence import Recurrence
from ..scans import AbstractScan
from ..scans._default import across
from ..sweeps import AbstractSweep, Rows
from ..sweeps._base import Step
from ._convergence import displacements, unexplained
from ._linearization import Linearization
from ._tolerance import SAMPLES, Tolerance

# From so many tangents on, more disturbances cost little beside them.
_MANY_SEEDS = 16
# Of a sweep that is not the plain one, at least so many steps are made once more, spread over the
# chunks by a ratio that visits every place in a chunk.
_CHECKED, _GOLDEN = 64, 0.6180339887498949


class Point(NamedTuple):
    """The starts of all chunks, and what a sweep found from there: the ends, what arrives at each
    chunk from the one before, and the chunks' Jacobians as far as the method wants them."""

    starts: Float[Array, "chunks size"]
    ends: Float[Array, "chunks size"]
    incoming: Float[Array, "chunks size"]
    jacobians: Float[Array, "chunks *matrix"] | None

    @property
    def defects(self) -> Float[Array, "chunks size"]:
        """By how much each start is not what arrives there. That of the first chunk of all is known
        and has none."""
        return self.incoming - self.starts


class Judged(NamedTuple):
    """The verdict on the starts of a sweep.

    - `scale`: of each element of the starts, in units of the default tolerance.
    - `errors`: a bound of the error of each start, in units of the tolerance; at most 1 if it is
        accepted.
    - `correction`: the largest correction of any start, in the same units.
    """

    scale: Float[Array, "chunks size"]
    errors: Float[Array, " chunks"]
    correction: Float[Array, ""]


class Chunks:
    """A recurrence cut into chunks, with the operations on the vectors of chunk starts and ends.

    Where the steps lie on several devices, so do the chunks: all arrays are of those of this
    device, and each has at least one.

    **Arguments:**

    - `recurrence`: of at least one step.
    - `linearization`: what to use of the chunks' Jacobians.
    - `chunk_size`: how many steps a chunk has.
    - `scan`: how the linear recurrence over the chunks is solved.
    - `sweep`: how the steps of the chunks are made.
    - `rtol`, `atol`: as for a solver.
    - `window`: if not 0, the number of steps at the end of each chunk over which rounding and
        memory are measured: less work, and a stricter judgement. At most a chunk.
    """

    def __init__(
        self,
        recurrence: Recurrence,
        linearization: Linearization,
        chunk_size: int,
        scan: AbstractScan,
        sweep: AbstractSweep,
        rtol: float | None,
        atol: float,
        window: int = 0,
    ):
        self.recurrence, self.linearization, self.window = recurrence, linearization, window
        self.line, self.scan = recurrence.line, across(scan, recurrence.line)
        self.length = recurrence.length
        self.chunk_size = min(chunk_size, self.length)
        self.num_chunks = -(-self.length // self.chunk_size)
        self.ravel, self.unravel, self.size, self.dtype = make_ravel(recurrence.init)
        self.tolerance = Tolerance(recurrence.init, rtol, atol)
        self._step, self._xs = recurrence.step, recurrence.xs
        self.first_start = jnp.expand_dims(self.ravel(recurrence.init), 0)
        self._sweep = sweep
        rows = (self.length, self.num_chunks, self.chunk_size, self.chunk_size)
        self._rows = Rows(*rows, reverse=recurrence.reverse)
        self._inputs = sweep.prepare(self._xs, self._rows)

    def _slice(self, tree: PyTree[Array], first: int, count: int) -> PyTree[Array]:
        """What a tree of inputs or states holds at `count` times from `first` on, a chunk apart."""
        stop = first + (count - 1) * self.chunk_size + 1 if count else first
        rows = self.recurrence.at(slice(first, stop, self.chunk_size))
        return jtu.tree_map(lambda x: x[rows], tree)

    def incoming(self, ends: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
        """What arrives at each chunk: the end of the one before, or where all begins."""
        return self.line.shift_right(ends, self.first_start[0])

    @property
    def is_first(self) -> Bool[Array, " chunks"]:
        """Which chunk is the first of all."""
        return self.line.positions(self.num_chunks) == 0

    @property
    def _num_followed(self) -> int:
        """How many chunks are followed by another, and so have all their steps."""
        return self.num_chunks if self.line.is_sharded else self.num_chunks - 1

    def _incoming(self, ends: Float[Array, "followed size"]) -> Float[Array, "chunks size"]:
        """As `incoming`, if what nothing follows has been left out."""
        return self.incoming(self._padded(ends))

    def _padded(self, ends: Float[Array, "followed size"]) -> Float[Array, "chunks size"]:
        missing = self.num_chunks - len(ends)
        return jnp.pad(ends, [(0, missing), (0, 0)]) if missing else ends

    def guess(self, guess: PyTree[Array] | None, overlap: int = 0) -> Float[Array, "chunks size"]:
        """The starts of all chunks: a user's guess, or `step(init, x)` at the step before. With an
        `overlap`, of at most a chunk, the states that so many steps lead to from guesses before
        them."""
        count, before = self._num_followed, self.chunk_size - 1 - overlap
        whole = before < 0  # from the guessed starts themselves
        first = self.chunk_size - 1 if whole else before
        if guess is None:
            inputs = self._slice(self._xs, first, count)
            guesses = jax.vmap(self._step, in_axes=(None, 0))(self.recurrence.init, inputs)
        else:
            guesses = self._slice(guess, first, count)
        guesses = jax.vmap(self.ravel)(guesses)
        guesses = self._incoming(guesses)[:count] if whole else guesses
        guesses = finite_or(guesses, 0.0)
        if overlap and count:
            ends = self._ends(guesses, self._last_rows(overlap))
            guesses = finite_or(ends, 0.0)
        return self._incoming(guesses)

    def _last_rows(self, count: int) -> Rows:
        """The last steps of all chunks that are followed by another."""
        first = self.chunk_size - count
        return self._rows._replace(num_chunks=self._num_followed, num_steps=count, first=first)

    def _ends(self, starts: Float[Array, "n size"], rows: Rows) -> Float[Array, "n size"]:
        """Where any number of starts lead under inputs of their own."""
        inputs = self._sweep.prepare(self._xs, rows)
        return self._lead(self._step, starts, inputs, rows)

    def _lead(self, step, starts: Float[Array, "n size"], inputs, rows: Rows) -> Array:
        """Where any number of starts lead."""
        if self._sweep.takes_vectors:
            step = self._on_vectors(step)
            return self._sweep.run(step, starts, inputs, rows, keep=False)[0]
        states = jax.vmap(self.unravel)(starts)
        ends, _ = self._sweep.run(step, states, inputs, rows, keep=False)
        return jax.vmap(self.ravel)(ends)

    def _on_vectors(self, step):
        return lambda vector, x: self.ravel(step(self.unravel(vector), x))

    def ends(self, starts: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
        """The ends of all chunks from any starts, that of the first chunk included."""
        return self._lead(self._step, starts, self._inputs, self._rows)

    def through_first_chunk(self, vectors: Float[Array, "n size"]) -> Float[Array, "n size"]:
        """What any number of states become under the inputs of the first chunk."""
        rows = self._rows._replace(length=self.chunk_size, num_chunks=len(vectors), stride=0)
        first = self.recurrence.at(slice(0, self.chunk_size, 1))
        xs = self.line.from_first(jtu.tree_map(lambda x: x[first], self._xs))
        return self._lead(self._step, vectors, self._sweep.prepare(xs, rows), rows)

    def sweep(self, starts: Float[Array, "chunks size"]) -> Point:
        """Runs all chunks, with their tangents."""
        propagated, kept = self.linearization
        if propagated is None:
            ends = self.ends(starts)
            jacobians = None if kept is None else jnp.ones_like(ends)
            return Point(starts, ends, self.incoming(ends), jacobians)
        ends, jacobians = self._push(propagated, starts)
        if kept is not None and kept != propagated:
            jacobians = kept.restrict(propagated, jacobians)
        return Point(starts, ends, self.incoming(ends), jacobians)

    def _push(self, propagated, starts):
        """The ends of all chunks, and their Jacobians."""
        seeds = place_like(jnp.asarray(propagated.seeds(self.size, self.dtype)), starts)
        ravel, unravel, step = self.ravel, self.unravel, self._step
        if self._sweep.takes_vectors:
            ravel = unravel = lambda vector: vector
            step = self._on_vectors(step)
        tangents = jax.vmap(unravel)(seeds)
        tangents = jtu.tree_map(
            lambda t: jnp.broadcast_to(t, (self.num_chunks, *t.shape)), tangents
        )
        carry, push = (jax.vmap(unravel)(starts), tangents), _with_tangents(step)
        (ends, tangents), _ = self._sweep.run(push, carry, self._inputs, self._rows, keep=False)
        tangents = jax.vmap(jax.vmap(ravel))(tangents)
        return jax.vmap(ravel)(ends), propagated.compress(tangents)

    def trajectory(self, starts: Float[Array, "chunks size"]):
        """The ends of all chunks, and the states after every step."""
        starts = jax.vmap(self.unravel)(starts)
        ends, states = self._sweep.run(self._step, starts, self._inputs, self._rows, keep=True)
        return jax.vmap(self.ravel)(ends), states

    # --- the judgement ------------------------------------------------------------------------

    def judge(
        self,
        point: Point,
        moved: Float[Array, "chunks size"],
        defects: Float[Array, "chunks size"],
        states: PyTree[Array] | None = None,
    ) -> Judged:
        """Judges the starts of a sweep; see `_convergence.py` for the rule.

        **Arguments:**

        - `point`: the starts, their ends, and the Jacobians by which they would be corrected.
        - `moved`: as the method of that name gives it.
        - `defects`: those of an earlier sweep: the direction in which memory is measured. Being
            independent of `point`, they let both sweeps run at the same time.
        - `states`: the trajectory, if `window` is not 0.
        """
        tolerance, starts, line = self.tolerance, point.starts, self.line
        samples = self._samples(pushes=point.jacobians is not None)
        displaced, disturbed, response = self._probe(starts, defects, states, samples)
        count = len(response)
        effect = self._padded(tolerance.effect(point.ends[:count], disturbed))
        before = line.after(effect, jnp.abs(moved).astype(effect.dtype))
        scale = tolerance.scale(starts, line.shift_right(before, jnp.zeros_like(before[0])))
        response, displaced = self._padded(response - point.ends[:count]), self._padded(displaced)
        defects = point.defects.astype(tolerance.wide)
        correction = jnp.abs(defects + moved.astype(tolerance.wide))
        rows = (displaced, response, self._apply(point, displaced), tolerance.rounding(effect))
        rows = [x.astype(tolerance.wide) for x in (*rows, line.after(correction, scale))]
        left = unexplained(*rows, scan=self.scan)
        # Where larger elements cancel, a state has the rounding of what it remembers.
        remembered = jnp.minimum(left.rounding, tolerance.most(starts))
        excess = jnp.maximum(correction - remembered, 0)
        parts = jnp.stack([jnp.maximum(excess + left.error, jnp.abs(defects)), correction])
        errors, sizes = tolerance.norm(parts, jnp.broadcast_to(scale, parts.shape))
        return Judged(scale, errors, jnp.max(sizes))

    def _samples(self, pushes: bool) -> int:
        """How many disturbances to try of each chunk: more where chunks are few, or where a sweep
        `pushes` many tangents."""
        propagated = self.linearization.propagated
        many = propagated is not None and propagated.num_seeds(self.size) >= _MANY_SEEDS
        return SAMPLES if pushes and many else -(-SAMPLES // min(self.num_chunks, SAMPLES))

    def _probe(
        self,
        starts: Float[Array, "chunks size"],
        defects: Float[Array, "chunks size"],
        states: PyTree[Array] | None,
        samples: int,
    ) -> tuple[Float[Array, "n size"], Float[Array, "samples n size"], Float[Array, "n size"]]:
        """Displacements of the starts, or of where windows begin; and where chunks lead if each
        step starts from a disturbed state, and where if only their starts are displaced."""
        begin, rows, inputs = starts, self._rows, self._inputs
        if self.window:
            begin, rows = self._in_window(starts, states), self._last_rows(self.window)
            inputs = self._sweep.prepare(self._xs, rows)
        displaced = displacements(begin, defects[: len(begin)], self.tolerance.of_each(begin))
        inputs = self._sweep.prepare(jnp.arange(self.length), rows), inputs
        begins = jnp.stack([begin] * samples + [begin + displaced])
        ends = self._sampled(lambda step, begin: self._lead(step, begin, inputs, rows), begins)
        return displaced, ends[:-1], ends[-1]

    def _sampled(self, lead: Callable[[Step, Array], Array], starts: Array) -> Array:
        """What `lead(step, start)` makes of several starts, with a step that disturbs the state for
        all of them but the last, and that consumes the place of the disturbance, too."""
        count = len(starts)

        def sample(start, first, strength):
            def disturbed_step(state, inputs):
                place, x = inputs
                return self._step(self.tolerance.disturb(state, first + place, strength), x)

            return lead(disturbed_step, start)

        strengths = jnp.asarray([1.0] * (count - 1) + [0.0], jnp.float32)
        return jax.vmap(sample)(starts, jnp.asarray(self.length * np.arange(count)), strengths)

    def _in_window(self, starts, states) -> Float[Array, "followed size"]:
        """The states from which the window of each chunk that is followed by another begins."""
        if self.window == self.chunk_size:
            return starts[: self._num_followed]
        first = self.chunk_size - self.window - 1
        return jax.vmap(self.ravel)(self._slice(states, first, self._num_followed))

    def _apply(self, point: Point, vectors: Float[Array, "chunks size"]) -> Array:
        """What the linearization makes of one vector per chunk, finite or not."""
        kept = self.linearization.kept
        if kept is None or point.jacobians is None:
            return jnp.zeros_like(vectors)
        return kept.apply(point.jacobians, vectors)

    @property
    def is_plain(self) -> bool:
        """Whether the sweep calls the step as it is."""
        return self._sweep.plain

    def is_wrong(self, starts, states: PyTree[Array]) -> Bool[Array, ""]:
        """Whether the sweep errs: whether any state is not what the plain step makes of the state
        before it. Some steps of every chunk are made once more, at other places in each. Of use if
        the sweep is not plain."""
        many = min(-(-_CHECKED // self.num_chunks), self.chunk_size)
        index = np.arange(self.num_chunks * many)
        place = np.floor(index * _GOLDEN % 1 * self.chunk_size).astype(int)
        chunk = index // many
        times = np.minimum(chunk * self.chunk_size + place, self.length - 1)
        at_start = times % self.chunk_size == 0

        def taken(tree, times):
            times = self.length - 1 - times if self.recurrence.reverse else times
            return jtu.tree_map(lambda x: x[times], tree)

        before = jax.vmap(self.ravel)(taken(states, np.where(at_start, times, times - 1)))
        before = jnp.where(jnp.expand_dims(jnp.asarray(at_start), 1), starts[chunk], before)
        got = jax.vmap(self.ravel)(taken(states, times))
        inputs = jnp.asarray(index), taken(self._xs, times)

        def lead(step, vectors):
            return jax.vmap(self.ravel)(jax.vmap(step)(jax.vmap(self.unravel)(vectors), inputs))

        ends = self._sampled(lead, jnp.stack([before] * (self._samples(pushes=False) + 1)))
        effect = self.tolerance.effect(ends[-1], ends[:-1])
        scale = self.tolerance.scale(got, effect)
        wrong = self.tolerance.norm(ends[-1] - got, scale) > 1
        return self.line.any(jnp.any(wrong))

    # --- the correction -----------------------------------------------------------------------

    def moved(self, point: Point) -> Float[Array, "chunks size"]:
        """By how much the corrections of the chunks before move what arrives at each chunk."""
        kept = self.linearization.kept
        if kept is None or point.jacobians is None:
            return jnp.zeros_like(point.starts)
        matrices = self._finite_matrices(point.jacobians)
        defects = finite_or(point.defects, 0.0)
        # What a correction becomes at the end of its chunk is carried, not the correction itself:
        # then each device needs the matrices of its own chunks only.
        return self.scan.prefix_states(kept, matrices, kept.apply(matrices, defects))

    def safeguarded(
        self, point: Point, starts: Float[Array, "chunks size"]
    ) -> Float[Array, "chunks size"]:
        """The new starts; where they are not finite, because the linear recurrence overflows, the
        Jacobi update; and where that is not either, the old start."""
        return finite_or(starts, finite_or(point.incoming, point.starts))

    def overflown(self, point: Point, moved: Float[Array, "chunks size"]) -> Bool[Array, " chunks"]:
        """Which starts the linear recurrence, or the sweep, overflows at."""
        overflown = ~jnp.isfinite(moved).all(-1)
        if point.jacobians is not None:
            overflown |= ~_finite(point.jacobians).reshape(-1)
        return overflown

    def _finite_matrices(self, x: Float[Array, "chunks *matrix"]) -> Array:
        """Zero for the chunks whose matrices are not finite throughout; or where most elements do
        not influence each other for the entries that are not, which takes no reduction."""
        propagated = self.linearization.propagated
        if propagated is not None and propagated.num_seeds(self.size) < max(self.size, 2):
            return finite_or(x, 0.0)
        return where_finite(x, 0)


def _with_tangents(step):
    """A step of a state together with tangents, which are stacked along a leading axis."""

    def pushed(carry, x):
        state, tangents = carry
        state, tangent_map = jax.linearize(lambda s: step(s, x), state)
        return state, jax.vmap(tangent_map)(tangents)

    return pushed


def _finite(x: Array) -> Bool[Array, "chunks ..."]:
    """Which chunks (entries along the leading axis) are finite throughout; keeps the axes."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)), keepdims=True)


def where_finite(x: Array, otherwise: Array | int) -> Array:
    return jnp.where(_finite(x), x, otherwise)
