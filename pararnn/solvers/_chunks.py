"""A recurrence cut into chunks: sweeps over them, corrections of their starts, and the finish."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import place_like, spread
from .._misc import bool_where, num_steps, raveler
from .._norms import alignment
from .._recurrence import Recurrence
from ..scans import AbstractScan
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
    - `rtol`, `atol`: as for a solver.
    """

    def __init__(
        self,
        recurrence: Recurrence,
        linearization: Linearization,
        chunk_size: int,
        scan: AbstractScan,
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
        self._chunked_xs = jtu.tree_map(self._to_chunks, self._xs)

    def _to_chunks(self, x: Array) -> Array:
        """`(L, ...) -> (chunk_size, num_chunks, ...)`. The last input is repeated to fill the last
        chunk, so that surplus steps see a plausible input; what they compute is dropped."""
        surplus = self.chunk_size * self.num_chunks - self.length
        if surplus:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (surplus, *x.shape[1:]))])
        return jnp.swapaxes(x.reshape(self.num_chunks, self.chunk_size, *x.shape[1:]), 0, 1)

    def _from_chunks(self, x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape(self.num_chunks * self.chunk_size, *x.shape[2:])[: self.length]

    def guess(self, guess: PyTree[Array] | None) -> Float[Array, "starts size"]:
        """The starts of all chunks but the first: a user's guess, or `step(init, x)` at the step
        before."""
        last = slice(self.chunk_size - 1, (self.num_chunks - 1) * self.chunk_size, self.chunk_size)
        if guess is None:
            inputs = jtu.tree_map(lambda x: x[last], self._xs)
            starts = jax.vmap(self._step, in_axes=(None, 0))(self.recurrence.init, inputs)
        else:
            starts = jtu.tree_map(lambda g: g[last], guess)
        starts = jax.vmap(self.ravel)(starts)
        return jnp.where(jnp.isfinite(starts), starts, 0)

    def ends(self, starts: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
        """The ends of all chunks from any starts, that of the first chunk included."""
        states = jax.vmap(self.unravel)(starts)
        ends, _ = _run(jax.vmap(self._step), states, self._chunked_xs, keep=False)
        return jax.vmap(self.ravel)(ends)

    def through_first_chunk(self, vectors: Float[Array, "n size"]) -> Float[Array, "n size"]:
        """What any number of states become under the inputs of the first chunk."""
        inputs = jtu.tree_map(lambda x: x[:, 0], self._chunked_xs)
        states = jax.vmap(self.unravel)(vectors)
        ends, _ = _run(jax.vmap(self._step, in_axes=(0, None)), states, inputs, keep=False)
        return jax.vmap(self.ravel)(ends)

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
        states = jax.vmap(self.unravel)(starts)
        seeds = place_like(jnp.asarray(propagated.seeds(self.size, self.dtype)), starts)
        tangents = jax.vmap(self.unravel)(seeds)
        tangents = jtu.tree_map(
            lambda t: jnp.broadcast_to(t, (self.num_chunks, *t.shape)), tangents
        )
        push = jax.vmap(_with_tangents(self._step))
        (ends, tangents), _ = _run(push, (states, tangents), self._chunked_xs, keep=False)
        tangents = jax.vmap(jax.vmap(self.ravel))(tangents)
        return jax.vmap(self.ravel)(ends), propagated.compress(tangents)

    def trajectory(self, starts: Float[Array, "starts size"]):
        """The ends of all chunks, and the states after every step."""
        starts = jax.vmap(self.unravel)(jnp.concatenate([self.first_start, starts]))
        ends, states = _run(jax.vmap(self._step), starts, self._chunked_xs, keep=True)
        return jax.vmap(self.ravel)(ends), jtu.tree_map(self._from_chunks, states)

    def disturbed_ends(self, starts: Float[Array, "starts size"]) -> Float[Array, "chunks size"]:
        """The ends of all chunks where each step starts from a disturbed state."""
        states = jax.vmap(self.unravel)(jnp.concatenate([self.first_start, starts]))
        places = jnp.arange(self.chunk_size * self.num_chunks).reshape(self.chunk_size, -1)
        inputs = (places, self._chunked_xs)
        ends, _ = _run(jax.vmap(self._disturbed_step), states, inputs, keep=False)
        return jax.vmap(self.ravel)(ends)

    def _disturbed_step(self, state, inputs):
        place, x = inputs
        return self._step(self.tolerance.disturb(state, place), x)

    def fine_scale(self, starts, ends) -> Float[Array, "starts size"]:
        """The scale of each element of the starts, from a sweep that has led to `ends`."""
        return self.tolerance.fine(starts, ends[:-1], self.disturbed_ends(starts)[:-1])

    def mismatches(self, states: PyTree[Array]) -> Float[Array, " starts"]:
        """By how much the first state of each chunk but the first differs from the step of the
        state before it, in units of the tolerance."""
        first = slice(self.chunk_size, None, self.chunk_size)
        last = slice(self.chunk_size - 1, self.length - 1, self.chunk_size)
        before, got = (jtu.tree_map(lambda s, at=at: s[at], states) for at in (last, first))
        inputs = jtu.tree_map(lambda x: x[first], self._xs)
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
        matrices = where_finite(point.jacobians[:-1], 0)
        defects = where_finite(point.defects, 0)
        delta = self.scan.affine(kept, matrices, defects)
        incoming = jnp.concatenate([jnp.zeros_like(delta[:1]), delta])[: len(delta)]
        return self.usable(point, new + kept.apply(matrices, incoming))

    def usable(self, point: Point, corrected: Float[Array, "starts size"]):
        """As `correct`, for starts that are corrected already, finite or not."""
        new = point.ends[:-1]
        usable = jnp.isfinite(corrected).all(-1)
        if point.jacobians is not None:
            usable &= _finite(point.jacobians[:-1]).reshape(-1)
        return where_finite(where_finite(corrected, new), point.starts), ~usable

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


def _run(step, carry, chunked_xs, *, keep: bool):
    """All steps of the chunks, one after another; chunks of one step need no loop."""

    def body(carry, x):
        carry = step(carry, x)
        return carry, carry if keep else None

    if num_steps(chunked_xs) == 1:
        carry, kept = body(carry, jtu.tree_map(lambda x: x[0], chunked_xs))
        return carry, jtu.tree_map(lambda k: jnp.expand_dims(k, 0), kept)
    return jax.lax.scan(body, carry, chunked_xs)


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
    block = chunk_size * max(1, math.isqrt(length) // chunk_size)

    def one(state, x):
        state = step(state, x)
        return state, state

    def turn(carry):
        start, state, states = carry
        index = start + jnp.arange(block)
        inputs = jtu.tree_map(lambda x: jnp.take(x, index, axis=0, mode="clip"), xs)
        state, new = jax.lax.scan(one, state, inputs)
        states = jtu.tree_map(lambda s, n: s.at[index].set(n, mode="drop"), states, new)
        return start + block, state, states

    before = jtu.tree_map(lambda s: s[first_step - 1], states)
    state = bool_where(first_step == 0, recurrence.init, before)
    xs = spread(xs, first_step)
    carry = (place_like(first_step, states), state, states)
    with jax.named_scope("pararnn_finish"):
        return jax.lax.while_loop(lambda carry: carry[0] < length, turn, carry)[2]
