"""The verdict on the starts of a sweep, and on the sweep itself.

`_convergence.py` has the rule, in numbers; here the numbers are measured, by further lanes of the
same chunks: some whose state is disturbed in every step, and one from a displaced start.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..sweeps._base import Step
from ._chunks import Chunks, Point
from ._convergence import displacements, unexplained
from ._tolerance import SAMPLES

# From so many tangents on, more disturbed lanes cost little beside them.
_MANY_SEEDS = 16
# The number of steps that check a sweep which does not call the step as it is, at places spread
# over the chunks by the golden ratio, which visits all places evenly.
_CHECKED, GOLDEN = 64, 0.6180339887498949


class Verdict(NamedTuple):
    """The verdict on the starts of a sweep.

    - `effect`: what disturbances of the states in each chunk make of its end, at most, in this
        sweep and in those before it, as long as the starts are nearly right; 0 where they are not.
    - `scale`: of each element of the starts, in units of the default tolerance.
    - `errors`: a bound of the error of each start, in units of the tolerance; at most 1 if it is
        accepted.
    - `correction`: the largest correction of any start, in the same units.
    """

    effect: Float[Array, "chunks size"]
    scale: Float[Array, "chunks size"]
    errors: Float[Array, " chunks"]
    correction: Float[Array, ""]

    @classmethod
    def none(cls, chunks: Chunks) -> "Verdict":
        """Before the first sweep."""
        zeros = jnp.zeros((chunks.num_chunks, chunks.size), chunks.tolerance.wide)
        infinite = jnp.asarray(jnp.inf, jnp.float32)
        return cls(zeros, zeros, jnp.full(chunks.num_chunks, infinite), infinite)


def judge(
    chunks: Chunks,
    point: Point,
    propagated: Float[Array, "chunks size"],
    direction: Float[Array, "chunks size"],
    states: PyTree[Array] | None = None,
    previous: Verdict | None = None,
    iteration: Int[Array, ""] | int = 0,
) -> Verdict:
    """Judges the starts of a sweep.

    **Arguments:**

    - `point`: the starts, their ends, and the Jacobians by which they would be corrected.
    - `propagated`: `chunks.propagate_defects(point)`.
    - `direction`: in which memory is measured: the defects of an earlier sweep. Being independent
        of `point`, they let both sweeps run at the same time.
    - `states`: the trajectory, if `chunks.window` is not 0.
    - `previous`: the verdict on the last sweep; `None` if there is only one verdict, which then
        takes more samples.
    - `iteration`: makes the disturbances differ from those of other iterations.
    """
    tolerance, starts, shards = chunks.tolerance, point.starts, chunks.shards
    samples = SAMPLES
    if previous is not None:
        samples = _num_samples(chunks, pushes=point.jacobians is not None)
    displaced, disturbed, response = _probe(chunks, starts, direction, states, samples, iteration)
    count = len(response)
    effect = kept = chunks.pad(tolerance.effect(point.ends[:count], disturbed))
    defects = point.defects.astype(tolerance.wide)
    correction = jnp.abs(defects + propagated.astype(tolerance.wide))
    if previous is not None:
        # A disturbance is one sample of what rounding does to a chunk, which may be small by
        # accident; but what it does to states that are far from right says nothing.
        near = tolerance.is_near(jnp.maximum(correction, jnp.abs(defects)), starts)
        kept = jnp.where(near, jnp.maximum(effect, previous.effect), 0)
        effect = jnp.maximum(effect, kept)
    before = shards.sequenced_after(effect, jnp.abs(propagated).astype(effect.dtype))
    scale = tolerance.scale(starts, shards.shift_right(before))
    response, displaced = chunks.pad(response - point.ends[:count]), chunks.pad(displaced)
    rows = displaced, response, chunks.apply(point, displaced), tolerance.rounding(effect)
    rows = *rows, shards.sequenced_after(correction, scale)
    left = unexplained(*(x.astype(tolerance.wide) for x in rows), scan=chunks.scan)
    # Where larger elements cancel, a state has the rounding of what it remembers.
    remembered = jnp.minimum(left.rounding, tolerance.most(starts))
    excess = jnp.maximum(correction - remembered, 0)
    errors = jnp.maximum(excess + left.error, jnp.abs(defects))
    both = jnp.stack([errors, correction])
    errors, sizes = tolerance.norm(both, jnp.broadcast_to(scale, both.shape))
    return Verdict(kept, scale, errors, jnp.max(sizes))


def is_wrong(
    chunks: Chunks, starts: Float[Array, "chunks size"], states: PyTree[Array]
) -> Bool[Array, ""]:
    """Whether any state is not what the plain step makes of the state before it: the check of a
    sweep that is not plain. Some steps of every chunk are made once more, at other places in each.
    """
    size, tolerance = chunks.chunk_size, chunks.tolerance
    many = min(-(-_CHECKED // chunks.num_chunks), size)
    index = np.arange(chunks.num_chunks * many)
    place = np.floor(index * GOLDEN % 1 * size).astype(int)
    chunk = index // many
    times = np.minimum(chunk * size + place, chunks.length - 1)
    at_start = times % size == 0

    def take(tree, times):
        times = chunks.length - 1 - times if chunks.recurrence.reverse else times
        return jtu.tree_map(lambda x: x[times], tree)

    before = jax.vmap(chunks.ravel)(take(states, np.where(at_start, times, times - 1)))
    before = jnp.where(jnp.expand_dims(jnp.asarray(at_start), 1), starts[chunk], before)
    got = jax.vmap(chunks.ravel)(take(states, times))
    inputs = jnp.asarray(index), take(chunks.xs, times)

    def run(step, vectors):
        return jax.vmap(chunks.ravel)(jax.vmap(step)(jax.vmap(chunks.unravel)(vectors), inputs))

    lanes = jnp.stack([before] * (_num_samples(chunks, pushes=False) + 1))
    ends = _disturbed(chunks, run, lanes)
    scale = tolerance.scale(got, tolerance.effect(ends[-1], ends[:-1]))
    wrong = tolerance.norm(ends[-1] - got, scale) > 1
    return chunks.shards.any(jnp.any(wrong))


def _num_samples(chunks: Chunks, pushes: bool) -> int:
    """The number of disturbed lanes of each chunk: more where chunks are few, or where a sweep
    `pushes` many tangents."""
    pushed = chunks.linearization.pushed
    many = pushed is not None and pushed.num_seeds(chunks.size) >= _MANY_SEEDS
    return SAMPLES if pushes and many else -(-SAMPLES // min(chunks.num_chunks, SAMPLES))


def _probe(
    chunks: Chunks,
    starts: Float[Array, "chunks size"],
    direction: Float[Array, "chunks size"],
    states: PyTree[Array] | None,
    samples: int,
    iteration: Int[Array, ""] | int,
) -> tuple[Float[Array, "n size"], Float[Array, "samples n size"], Float[Array, "n size"]]:
    """`(displaced, disturbed, response)`: displacements of the starts, or of the states at which
    the windows begin; the ends of the lanes that are disturbed in each step; and those of the lane
    from the displaced starts."""
    first, rows, inputs = starts, chunks.rows, chunks.inputs
    if chunks.window:
        first, rows = _at_window(chunks, starts, states), chunks.last_rows(chunks.window)
        inputs = chunks.sweep_method.prepare(chunks.xs, rows)
    displaced = displacements(first, direction[: len(first)], chunks.tolerance.of_each(first))
    inputs = chunks.sweep_method.prepare(jnp.arange(chunks.length), rows), inputs
    lanes = jnp.stack([first] * samples + [first + displaced])
    place = iteration * (samples + 1) * chunks.length
    ends = _disturbed(chunks, lambda step, lane: chunks.run(step, lane, inputs, rows), lanes, place)
    return displaced, ends[:-1], ends[-1]


def _disturbed(
    chunks: Chunks,
    run: Callable[[Step, Array], Array],
    lanes: Float[Array, "lanes n size"],
    place: Int[Array, ""] | int = 0,
) -> Float[Array, "lanes n size"]:
    """`run(step, lane)` for several lanes, with a step that disturbs the state in all but the last
    lane. The inputs of that step are the place of the disturbance, counted from `place` on, and the
    step's own."""
    count = len(lanes)

    def one(lane, first, strength):
        def disturbed_step(state, inputs):
            place, x = inputs
            return chunks.step(chunks.tolerance.disturb(state, first + place, strength), x)

        return run(disturbed_step, lane)

    strengths = jnp.asarray([1.0] * (count - 1) + [0.0], jnp.float32)
    first = jnp.asarray(chunks.length * np.arange(count)) + place
    return jax.vmap(one)(lanes, first, strengths)


def _at_window(chunks: Chunks, starts, states) -> Float[Array, "followed size"]:
    """The states from which the window of each chunk that another one follows begins."""
    if chunks.window == chunks.chunk_size:
        return starts[: chunks.num_followed]
    first = chunks.chunk_size - chunks.window - 1
    return jax.vmap(chunks.ravel)(chunks.slice(states, first, chunks.num_followed))
