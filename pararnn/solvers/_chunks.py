"""A recurrence cut into chunks: sweeps over them, corrections of their starts, and the finish."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import place_like, spread
from .._misc import bool_where, raveler
from .._norms import alignment
from .._recurrence import Recurrence
from ..scans import AbstractScan
from ..sweeps import AbstractSweep, Rows
from ._linearization import Linearization
from ._tolerance import Tolerance

# From this cosine on, two changes point the same way.
_SAME_WAY = 0.5


class Point(NamedTuple):
    """The starts of all chunks but the first, and what a sweep found from there: the ends of all
    chunks, and their Jacobians as far as the method wants them."""

    starts: Float[Array, "starts size"]
    ends: Float[Array, "chunks size"]
    jacobians: Float[Array, "chunks *matrix"] | None

    @property
    def defects(self) -> Float[Array, "starts size"]:
        """By how much each start is not the end of the chunk before."""
        return self.ends[:-1] - self.starts


class Chunks:
    """A recurrence cut into chunks, with the operations on the vectors of chunk starts and ends.

    **Arguments:**

    - `recurrence`: of at least one step.
    - `linearization`: what to use of the chunks' Jacobians.
    - `chunk_size`: how many steps a chunk has.
    - `scan`: how the linear recurrence over the chunks is solved.
    - `sweep`: how the steps of the chunks are made.
    - `rtol`, `atol`: as for a solver.
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
    ):
        self.recurrence, self.linearization, self.scan = recurrence, linearization, scan
        self.length = recurrence.length
        self.chunk_size = min(chunk_size, self.length)
        self.num_chunks = -(-self.length // self.chunk_size)
        self.ravel, self.unravel, self.size, self.dtype = raveler(recurrence.init)
        self.tolerance = Tolerance(recurrence.init, recurrence.structure, scan, rtol, atol)
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

    def guess(self, guess: PyTree[Array] | None, overlap: int = 0) -> Float[Array, "starts size"]:
        """The starts of all chunks but the first: a user's guess, or `step(init, x)` at the step
        before. With an `overlap`, of at most a chunk, the states that so many steps lead to from
        guesses before them."""
        count, first = self.num_chunks - 1, self.chunk_size - 1 - overlap
        missing = first < 0  # a whole chunk earlier, the first of them starts where chunk 0 does
        first, count = (self.chunk_size - 1, count - 1) if missing else (first, count)
        if guess is None:
            inputs = self._slice(self._xs, first, count)
            guesses = jax.vmap(self._step, in_axes=(None, 0))(self.recurrence.init, inputs)
        else:
            guesses = self._slice(guess, first, count)
        guesses = jax.vmap(self.ravel)(guesses)
        if missing:
            guesses = jnp.concatenate([self.first_start[: self.num_chunks - 1], guesses])
        guesses = jnp.where(jnp.isfinite(guesses), guesses, 0)
        if not overlap or self.num_chunks == 1:
            return guesses
        rows = self._rows._replace(
            num_chunks=self.num_chunks - 1, num_steps=overlap, first=self.chunk_size - overlap
        )
        ends = self._ends(guesses, rows)
        return jnp.where(jnp.isfinite(ends), ends, 0)

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
        return self._ends(vectors, self._rows._replace(num_chunks=len(vectors), stride=0))

    def sweep(self, starts: Float[Array, "starts size"]) -> Point:
        """Runs all chunks, with their tangents."""
        propagated, kept = self.linearization
        all_starts = jnp.concatenate([self.first_start, starts])
        if propagated is None:
            ends = self.ends(all_starts)
            return Point(starts, ends, None if kept is None else jnp.ones_like(ends))
        ends, jacobians = self._push(propagated, all_starts)
        if kept is not None and kept != propagated:
            jacobians = kept.restrict(propagated, jacobians)
        return Point(starts, ends, jacobians)

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

    def trajectory(self, starts: Float[Array, "starts size"]):
        """The ends of all chunks, and the states after every step."""
        starts = jax.vmap(self.unravel)(jnp.concatenate([self.first_start, starts]))
        ends, states = self._sweep.run(self._step, starts, self._inputs, self._rows, keep=True)
        return jax.vmap(self.ravel)(ends), states

    def disturbed_ends(self, starts: Float[Array, "starts size"]) -> Float[Array, "chunks size"]:
        """The ends of all chunks where each step starts from a disturbed state."""
        starts = jnp.concatenate([self.first_start, starts])
        times = jnp.arange(self.length)
        places = times % self.chunk_size * self.num_chunks + times // self.chunk_size
        places = self._sweep.prepare(jnp.flip(places) if self._rows.reverse else places, self._rows)
        inputs = (places, self._inputs)
        return self._lead(self._disturbed_step, starts, inputs, self._rows)

    def _disturbed_step(self, state, inputs):
        place, x = inputs
        return self._step(self.tolerance.disturb(state, place), x)

    def fine_scale(self, starts, ends) -> Float[Array, "starts size"]:
        """The scale of each element of the starts, from a sweep that has led to `ends`."""
        return self.tolerance.fine(starts, ends[:-1], self.disturbed_ends(starts)[:-1])

    def mismatches(self, states: PyTree[Array]) -> Float[Array, " starts"]:
        """By how much the first state of each chunk but the first differs from the step of the
        state before it, in units of the tolerance."""
        count = self.num_chunks - 1
        before = self._slice(states, self.chunk_size - 1, count)
        got, inputs = self._slice((states, self._xs), self.chunk_size, count)
        images = jax.vmap(self._step)(before, inputs)
        places = jnp.arange(self.num_chunks - 1)
        disturbed = jax.vmap(self._disturbed_step)(before, (places, inputs))
        got, images, disturbed = (jax.vmap(self.ravel)(x) for x in (got, images, disturbed))
        return self.tolerance.norm(images - got, self.tolerance.fine(got, images, disturbed))

    def correct(self, point: Point) -> tuple[Float[Array, "starts size"], Bool[Array, " starts"]]:
        """The new starts, and which of them had to be replaced: where the linear recurrence
        overflows, the Jacobi update stands in, and where that overflows too, the old start."""
        new = point.ends[:-1]
        kept = self.linearization.kept
        if kept is None or point.jacobians is None:
            return where_finite(new, point.starts), ~jnp.isfinite(new).all(-1)
        matrices = self._where_finite(point.jacobians[:-1], 0)
        defects = self._where_finite(point.defects, 0)
        delta = self.scan.affine(kept, matrices, defects)
        incoming = jnp.concatenate([jnp.zeros_like(delta[:1]), delta])[: len(delta)]
        return self.usable(point, new + kept.apply(matrices, incoming))

    def usable(self, point: Point, corrected: Float[Array, "starts size"]):
        """As `correct`, for starts that are corrected already, finite or not."""
        new = point.ends[:-1]
        usable = jnp.isfinite(corrected).all(-1)
        if point.jacobians is not None:
            usable &= _finite(point.jacobians[:-1]).reshape(-1)
        starts = self._where_finite(self._where_finite(corrected, new), point.starts)
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
        return alignment(unravel(change), unravel(previous)) > _SAME_WAY


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


def finish_sequentially(
    recurrence: Recurrence, states: PyTree[Array], first_step: Int[Array, ""], chunk_size: int
) -> PyTree[Array]:
    """Recomputes `states[first_step:]` one step after another.

    A loop with a dynamic number of turns, none if all has converged, because `vmap` would run both
    branches of a `cond`. A batched loop also selects over its whole carry at each turn, `states`
    included, so a turn makes about `sqrt(L)` steps.
    """
    step, xs, length = recurrence.step, recurrence.xs, recurrence.length
    reverse = recurrence.reverse
    block = chunk_size * max(1, math.isqrt(length) // chunk_size)

    def one(state, x):
        state = step(state, x)
        return state, state

    def rows(times):
        return jnp.where(times < length, length - 1 - times, length) if reverse else times

    def turn(carry):
        start, state, states = carry
        index = rows(start + jnp.arange(block))
        inputs = jtu.tree_map(lambda x: jnp.take(x, index, axis=0, mode="clip"), xs)
        state, new = jax.lax.scan(one, state, inputs)
        states = jtu.tree_map(lambda s, n: s.at[index].set(n, mode="drop"), states, new)
        return start + block, state, states

    before = jtu.tree_map(lambda s: s[rows(first_step - 1)], states)
    state = bool_where(first_step == 0, recurrence.init, before)
    xs = spread(xs, first_step)
    carry = (place_like(first_step, states), state, states)
    with jax.named_scope("pararnn_finish"):
        return jax.lax.while_loop(lambda carry: carry[0] < length, turn, carry)[2]
