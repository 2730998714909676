"""A recurrence cut into chunks: sweeps over them, and the correction of their starts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._misc import finite_or, make_ravel
from .._recurrence import Recurrence
from ..scans import AbstractScan
from ..structures import AbstractStructure
from ..sweeps import AbstractSweep, Rows
from ..sweeps._base import Step
from ._linearization import Linearization
from ._tolerance import Tolerance


class Point(NamedTuple):
    """A point of the iteration: the starts of all chunks, and the result of a sweep from there.

    - `starts`, `ends`: the states before the first and after the last step of each chunk.
    - `incoming`: the end of the previous chunk, or the initial state.
    - `jacobians`: the approximation of the chunks' Jacobians, as far as the method wants one.
    """

    starts: Float[Array, "chunks size"]
    ends: Float[Array, "chunks size"]
    incoming: Float[Array, "chunks size"]
    jacobians: Float[Array, "chunks *matrix"] | None

    @property
    def defects(self) -> Float[Array, "chunks size"]:
        """The difference between what arrives at each chunk and its start; 0 for the first."""
        return self.incoming - self.starts


class Chunks:
    """A recurrence cut into chunks, with the operations on the vectors of chunk starts and ends.

    If time is sharded, all arrays are this device's shard, and each device has at least one chunk.

    **Arguments:**

    - `recurrence`: of at least one step.
    - `linearization`: the approximation of the chunks' Jacobians.
    - `chunk_size`: the number of steps of a chunk.
    - `scan`: solves the linear recurrence over the chunks.
    - `sweep`: makes the steps of the chunks.
    - `rtol`, `atol`: as for a solver.
    - `tangent_step`: the step whose tangents a sweep pushes: one of the same values as the
        recurrence's, which is the default.
    - `window`: if not 0, the number of steps at the end of each chunk over which rounding and
        memory are measured: less work, and a stricter verdict. At most a chunk.
    - `normwise`: whether errors are judged by the largest of connected elements.
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
        *,
        tangent_step: Step | None = None,
        window: int = 0,
        normwise: bool = False,
    ):
        self.recurrence, self.linearization, self.window = recurrence, linearization, window
        self.shards, self.scan = recurrence.shards, recurrence.shards.sharded(scan)
        self.length = recurrence.length
        self.chunk_size = min(chunk_size, self.length)
        self.num_chunks = -(-self.length // self.chunk_size)
        self.ravel, self.unravel, self.size, self.dtype = make_ravel(recurrence.init)
        structure = recurrence.structure
        self.tolerance = Tolerance(recurrence.init, rtol, atol, structure, normwise)
        self.step, self.xs = recurrence.step, recurrence.xs
        self.tangent_step = self.step if tangent_step is None else tangent_step
        self.first_start = jnp.expand_dims(self.ravel(recurrence.init), 0)
        self.sweep_method = sweep
        rows = (self.length, self.num_chunks, self.chunk_size, self.chunk_size)
        self.rows = Rows(*rows, reverse=recurrence.reverse)
        self.inputs = sweep.prepare(self.xs, self.rows)

    @property
    def is_exact(self) -> bool:
        """Whether the matrices are the true Jacobians, so that the iteration converges
        quadratically, and in one correction if the step is affine."""
        linearization = self.linearization
        whole = self.tangent_step is self.step and linearization.pushed is not None
        return whole and linearization.used == linearization.pushed

    # --- which chunks, and what arrives at them -----------------------------------------------

    def slice(self, tree: PyTree[Array], first: int, count: int) -> PyTree[Array]:
        """The rows of inputs or states at `count` times from `first` on, a chunk apart."""
        stop = first + (count - 1) * self.chunk_size + 1 if count else first
        rows = self.recurrence.at(slice(first, stop, self.chunk_size))
        return jtu.tree_map(lambda x: x[rows], tree)

    def incoming(self, ends: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
        """The end of the previous chunk, or the initial state."""
        return self.shards.shift_right(ends, self.first_start[0])

    @property
    def is_first(self) -> Bool[Array, " chunks"]:
        """Which chunk is the first of all."""
        return self.shards.positions(self.num_chunks) == 0

    @property
    def num_followed(self) -> int:
        """The number of chunks that another one follows, which therefore have all their steps."""
        return self.num_chunks if self.shards.is_sharded else self.num_chunks - 1

    def pad(self, ends: Float[Array, "followed size"]) -> Float[Array, "chunks size"]:
        """Appends a zero row for the chunk that no other follows."""
        missing = self.num_chunks - len(ends)
        return jnp.pad(ends, [(0, missing), (0, 0)]) if missing else ends

    def guess(self, guess: PyTree[Array] | None) -> Float[Array, "chunks size"]:
        """The starts of all chunks: a user's guess, or `step(init, x)` at the step before."""
        return self.incoming(self.pad(self._guess_at(guess, self.chunk_size - 1)))

    def guess_early(self, guess: PyTree[Array] | None, overlap: int) -> Float[Array, "chunks size"]:
        """The starts that `overlap` steps, at most a chunk, lead to from guesses before them."""
        if overlap == self.chunk_size:
            # The initial state, which may be anything, is among them.
            guesses = finite_or(self.guess(guess)[: self.num_followed], 0.0)
        else:
            guesses = self._guess_at(guess, self.chunk_size - 1 - overlap)
        if not self.num_followed:
            return self.incoming(self.pad(guesses))
        rows = self.last_rows(overlap)
        inputs = self.sweep_method.prepare(self.xs, rows)
        ends = self.run(self.step, guesses, inputs, rows)
        return self.incoming(self.pad(finite_or(ends, 0.0)))

    def _guess_at(self, guess: PyTree[Array] | None, place: int) -> Float[Array, "followed size"]:
        """Guesses of the states after the step at this place in each chunk."""
        if guess is None:
            inputs = self.slice(self.xs, place, self.num_followed)
            guesses = jax.vmap(self.step, in_axes=(None, 0))(self.recurrence.init, inputs)
        else:
            guesses = self.slice(guess, place, self.num_followed)
        return finite_or(jax.vmap(self.ravel)(guesses), 0.0)

    def last_rows(self, count: int) -> Rows:
        """The last steps of all chunks that another one follows."""
        first = self.chunk_size - count
        return self.rows._replace(num_chunks=self.num_followed, num_steps=count, first=first)

    # --- sweeps -------------------------------------------------------------------------------

    def run(
        self, step: Step, starts: Float[Array, "n size"], inputs: PyTree[Array], rows: Rows
    ) -> Float[Array, "n size"]:
        """The ends of any chunks, by any step."""
        if self.sweep_method.takes_vectors:
            step = self._on_vectors(step)
            return self.sweep_method.run(step, starts, inputs, rows, keep=False)[0]
        states = jax.vmap(self.unravel)(starts)
        ends, _ = self.sweep_method.run(step, states, inputs, rows, keep=False)
        return jax.vmap(self.ravel)(ends)

    def _on_vectors(self, step: Step) -> Step:
        return lambda vector, x: self.ravel(step(self.unravel(vector), x))

    def ends(self, starts: Float[Array, "chunks size"]) -> Float[Array, "chunks size"]:
        """The ends of all chunks from any starts, that of the first chunk included."""
        return self.run(self.step, starts, self.inputs, self.rows)

    def through_first_chunk(self, vectors: Float[Array, "n size"]) -> Float[Array, "n size"]:
        """The ends of the first chunk from any number of starts."""
        rows = self.rows._replace(length=self.chunk_size, num_chunks=len(vectors), stride=0)
        first = self.recurrence.at(slice(0, self.chunk_size, 1))
        xs = self.shards.from_first(jtu.tree_map(lambda x: x[first], self.xs))
        return self.run(self.step, vectors, self.sweep_method.prepare(xs, rows), rows)

    def sweep(self, starts: Float[Array, "chunks size"]) -> Point:
        """Runs all chunks, with their tangents."""
        pushed, used = self.linearization
        if pushed is None:
            ends = self.ends(starts)
            jacobians = None if used is None else jnp.ones_like(ends)
            return Point(starts, ends, self.incoming(ends), jacobians)
        ends, jacobians = self._push(pushed, starts)
        if used is not None and used != pushed:
            jacobians = used.restrict(pushed, jacobians)
        return Point(starts, ends, self.incoming(ends), jacobians)

    def _push(
        self, pushed: AbstractStructure, starts: Float[Array, "chunks size"]
    ) -> tuple[Float[Array, "chunks size"], Float[Array, "chunks *matrix"]]:
        """The ends of all chunks, and their Jacobians."""
        seeds = self.shards.place_like(jnp.asarray(pushed.seeds(self.size, self.dtype)), starts)
        ravel, unravel, step = self.ravel, self.unravel, self.tangent_step
        if self.sweep_method.takes_vectors:
            ravel = unravel = lambda vector: vector
            step = self._on_vectors(step)
        tangents = jax.vmap(unravel)(seeds)
        tangents = jtu.tree_map(
            lambda t: jnp.broadcast_to(t, (self.num_chunks, *t.shape)), tangents
        )
        carry, push = (jax.vmap(unravel)(starts), tangents), _with_tangents(step)
        carry, _ = self.sweep_method.run(push, carry, self.inputs, self.rows, keep=False)
        ends, tangents = carry
        return jax.vmap(ravel)(ends), pushed.compress(jax.vmap(jax.vmap(ravel))(tangents))

    def trajectory(
        self, starts: Float[Array, "chunks size"]
    ) -> tuple[Float[Array, "chunks size"], PyTree[Array]]:
        """The ends of all chunks, and the states after every step."""
        carry, run = jax.vmap(self.unravel)(starts), self.sweep_method.run
        ends, states = run(self.step, carry, self.inputs, self.rows, keep=True)
        return jax.vmap(self.ravel)(ends), states

    # --- the correction -----------------------------------------------------------------------

    def apply(self, point: Point, vectors: Float[Array, "chunks size"]) -> Array:
        """The linearization applied to one vector per chunk, finite or not."""
        used = self.linearization.used
        if used is None or point.jacobians is None:
            return jnp.zeros_like(vectors)
        return used.apply(point.jacobians, vectors)

    def propagate_defects(self, point: Point) -> Float[Array, "chunks size"]:
        r"""The corrections of the previous chunks as they arrive at each chunk, $A_c δ_c$."""
        used = self.linearization.used
        if used is None or point.jacobians is None:
            return jnp.zeros_like(point.starts)
        matrices = self._finite_matrices(point.jacobians)
        defects = finite_or(point.defects, 0.0)
        # The recurrence carries a correction as of the end of its chunk, not as of its start: then
        # each device needs the matrices of its own chunks only.
        return self.scan.prefix_states(used, matrices, used.apply(matrices, defects))

    def safeguarded(
        self, point: Point, starts: Float[Array, "chunks size"]
    ) -> Float[Array, "chunks size"]:
        """The new starts; where the linear recurrence overflows, the Jacobi update; and where that
        overflows too, the old start."""
        return finite_or(starts, finite_or(point.incoming, point.starts))

    def overflown(
        self, point: Point, propagated: Float[Array, "chunks size"]
    ) -> Bool[Array, " chunks"]:
        """The starts at which the linear recurrence or the sweep overflows."""
        overflown = ~jnp.isfinite(propagated).all(-1)
        if point.jacobians is not None:
            overflown |= ~_is_finite(point.jacobians).reshape(-1)
        return overflown

    def _finite_matrices(self, x: Float[Array, "chunks *matrix"]) -> Array:
        """Zero for the chunks whose matrices are not finite throughout. If most elements do not
        influence each other, only for the entries that are not finite, which takes no reduction."""
        pushed = self.linearization.pushed
        if pushed is not None and pushed.num_seeds(self.size) < max(self.size, 2):
            return finite_or(x, 0.0)
        return where_finite(x, 0)


def _with_tangents(step):
    """A step of a state together with tangents, which are stacked along a leading axis."""

    def pushed(carry, x):
        state, tangents = carry
        state, tangent_map = jax.linearize(lambda s: step(s, x), state)
        return state, jax.vmap(tangent_map)(tangents)

    return pushed


def _is_finite(x: Array) -> Bool[Array, "chunks ..."]:
    """Which chunks (entries along the leading axis) are finite throughout; keeps the axes."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)), keepdims=True)


def where_finite(x: Array, otherwise: Array | int) -> Array:
    """`otherwise` for the chunks that are not finite throughout."""
    return jnp.where(_is_finite(x), x, otherwise)
