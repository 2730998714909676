"""A recurrence cut into chunks: sweeps over them, corrections of their starts, and the finish."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._devices import place_like
from .._misc import raveler
from .._norms import alignment
from .._recurrence import Recurrence
from ..scans import AbstractScan
from ..scans._named import across
from ..sweeps import AbstractSweep, Rows
from ..sweeps._base import Step
from ._linearization import Linearization
from ._tolerance import SAMPLES, Tolerance

# From this cosine on, two changes point the same way.
_SAME_WAY = 0.5


class Point(NamedTuple):
    """The starts of all chunks, and what a sweep found from there: the ends, what arrives at each
    chunk from the one before, and the chunks' Jacobians as far as the method wants them."""

    starts: Float[Array, "chunks size"]
    ends: Float[Array, "chunks size"]
    arriving: Float[Array, "chunks size"]
    jacobians: Float[Array, "chunks *matrix"] | None

    @property
    def defects(self) -> Float[Array, "chunks size"]:
        """By how much each start is not what arrives there. That of the first chunk of all is known
        and has none."""
        return self.arriving - self.starts


class Judged(NamedTuple):
    """What a sweep tells of the starts that it began with.

    - `arriving`: what arrives at each chunk from the one before.
    - `scale`: of each element of the starts.
    - `mismatches`: by how much the first state of each chunk differs from the step of the state
        before it, in units of the tolerance.
    """

    arriving: Float[Array, "chunks size"]
    scale: Float[Array, "chunks size"]
    mismatches: Float[Array, " chunks"]


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
    - `window`: if not 0, how many of the last steps of a chunk are tried to find out how exact its
        end can be, and what it keeps of a deviation: less work, and a stricter judgement. At most a
        chunk.
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
        self.ravel, self.unravel, self.size, self.dtype = raveler(recurrence.init)
        self.tolerance = Tolerance(recurrence.init, recurrence.structure, self.scan, rtol, atol)
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

    def arriving(self, ends: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
        """What arrives at each chunk: the end of the one before, or where all begins."""
        return self.line.earlier(ends, self.first_start[0])

    @property
    def is_first(self) -> Bool[Array, " chunks"]:
        """Which chunk is the first of all."""
        return self.line.positions(self.num_chunks) == 0

    @property
    def _num_followed(self) -> int:
        """How many chunks are followed by another, and so have all their steps."""
        return self.num_chunks if self.line.is_cut else self.num_chunks - 1

    def _arriving(self, ends: Float[Array, "followed size"]) -> Float[Array, "chunks size"]:
        """As `arriving`, if what nothing follows has been left out."""
        return self.arriving(self._padded(ends))

    def _padded(self, ends: Float[Array, "followed size"]) -> Float[Array, "chunks size"]:
        return jnp.pad(ends, [(0, self.num_chunks - len(ends)), (0, 0)])

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
        guesses = self._arriving(guesses)[:count] if whole else guesses
        guesses = jnp.where(jnp.isfinite(guesses), guesses, 0)
        if overlap and count:
            ends = self._ends(guesses, self._last_rows(overlap))
            guesses = jnp.where(jnp.isfinite(ends), ends, 0)
        return self._arriving(guesses)

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
        xs = self.line.of_first(jtu.tree_map(lambda x: x[first], self._xs))
        return self._lead(self._step, vectors, self._sweep.prepare(xs, rows), rows)

    def sweep(self, starts: Float[Array, "chunks size"]) -> Point:
        """Runs all chunks, with their tangents."""
        propagated, kept = self.linearization
        if propagated is None:
            ends = self.ends(starts)
            jacobians = None if kept is None else jnp.ones_like(ends)
            return Point(starts, ends, self.arriving(ends), jacobians)
        ends, jacobians = self._push(propagated, starts)
        if kept is not None and kept != propagated:
            jacobians = kept.restrict(propagated, jacobians)
        return Point(starts, ends, self.arriving(ends), jacobians)

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

    @property
    def _samples(self) -> int:
        """How many disturbances to try of each chunk: few chunks are few samples."""
        return -(-SAMPLES // min(self.num_chunks, SAMPLES))

    def _sampled(self, lead: Callable[[Step], Array]) -> Float[Array, "samples n size"]:
        """Where a step leads that starts from a disturbed state, which consumes its place too."""

        def sample(first):
            def disturbed_step(state, inputs):
                place, x = inputs
                return self._step(self.tolerance.disturb(state, first + place), x)

            return lead(disturbed_step)

        if self._samples == 1:
            return jnp.expand_dims(sample(0), 0)
        return jax.vmap(sample)(self.length * jnp.arange(self._samples))

    def _disturbed_ends(
        self, starts: Float[Array, "n size"], rows: Rows
    ) -> Float[Array, "samples n size"]:
        """Where chunks lead if each step starts from a disturbed state."""
        times = jnp.arange(self.length)
        places = times % self.chunk_size * self.num_chunks + times // self.chunk_size
        places = jnp.flip(places) if rows.reverse else places
        places = self._sweep.prepare(places, rows)
        inputs = self._inputs if rows == self._rows else self._sweep.prepare(self._xs, rows)
        return self._sampled(lambda step: self._lead(step, starts, (places, inputs), rows))

    def judged(self, starts, ends, states) -> Judged:
        """What is known of the starts from the sweep that has led to `ends` and `states`."""
        most = self.tolerance.most(starts)
        if self.window:
            begin = self._in_window(starts, states)
            disturbed = self._disturbed_ends(begin, self._last_rows(self.window))
        else:
            disturbed = self._disturbed_ends(starts, self._rows)
        # In one exchange.
        rows = (ends, *map(self._padded, disturbed))
        arriving, *disturbed = self.line.earlier(rows, (self.first_start[0],) * len(rows))
        scale = self.tolerance.fine(starts, arriving, jnp.stack(disturbed), most)
        return Judged(arriving, scale, self._mismatches(arriving, states, most))

    def _in_window(self, starts, states) -> Float[Array, "followed size"]:
        """The states from which the window of each chunk that is followed by another begins."""
        if self.window == self.chunk_size:
            return starts[: self._num_followed]
        first = self.chunk_size - self.window - 1
        return jax.vmap(self.ravel)(self._slice(states, first, self._num_followed))

    def deviated_ends(self, starts, states, deviations) -> Float[Array, "n size"]:
        """Where chunks end that start, or whose windows begin, with a deviation. If there are
        windows, only of the chunks that are followed by another."""
        if not self.window:
            return self.ends(starts + deviations)
        begin = self._in_window(starts, states)
        return self._ends(begin + deviations[: len(begin)], self._last_rows(self.window))

    def _mismatches(self, arriving, states: PyTree[Array], most) -> Float[Array, " chunks"]:
        before = jax.vmap(self.unravel)(arriving)
        got, inputs = self._slice((states, self._xs), 0, self.num_chunks)
        got, images = (jax.vmap(self.ravel)(x) for x in (got, jax.vmap(self._step)(before, inputs)))
        inputs = jnp.arange(self.num_chunks), inputs
        disturbed = self._sampled(lambda step: jax.vmap(self.ravel)(jax.vmap(step)(before, inputs)))
        scale = self.tolerance.fine(got, images, disturbed, most)
        return self.tolerance.norm(images - got, scale)

    def correct(self, point: Point) -> tuple[Float[Array, "chunks size"], Bool[Array, " chunks"]]:
        """The new starts; and which of them had to be replaced, or lead to one that had to be:
        where the linear recurrence overflows, the Jacobi update stands in, and where that overflows
        too, the old start."""
        kept = self.linearization.kept
        if kept is None or point.jacobians is None:
            return self.usable(point, point.arriving)
        matrices = self._where_finite(point.jacobians, 0)
        defects = self._where_finite(point.defects, 0)
        # What a correction becomes at the end of its chunk is carried, not the correction itself:
        # then each device needs the matrices of its own chunks only.
        moved = self.scan.arriving(kept, matrices, kept.apply(matrices, defects))
        return self.usable(point, point.arriving + moved)

    def usable(self, point: Point, corrected: Float[Array, "chunks size"]):
        """As `correct`, for starts that are corrected already, finite or not."""
        usable = jnp.isfinite(corrected).all(-1)
        if point.jacobians is not None:
            usable &= _finite(point.jacobians).reshape(-1)
        starts = self._where_finite(self._where_finite(corrected, point.arriving), point.starts)
        return starts, ~usable

    def _where_finite(self, x: Array, otherwise: Array | int) -> Array:
        """The chunks that are finite throughout; or where most elements do not influence each other
        the finite elements, which takes no reduction."""
        propagated = self.linearization.propagated
        if propagated is not None and propagated.num_seeds(self.size) < max(self.size, 2):
            return jnp.where(jnp.isfinite(x), x, otherwise)
        return where_finite(x, otherwise)

    def is_persistent(self, change, previous) -> Bool[Array, ""]:
        """Whether two successive changes of the starts point the same way, in some leaf.

        If so, more of them will add up; rounding has no direction.
        """
        unravel = jax.vmap(self.unravel)
        return alignment(unravel(change), unravel(previous), self.line) > _SAME_WAY


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
