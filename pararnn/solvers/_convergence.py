r"""The stopping rule: is the trajectory that a sweep computed as good as the sequential one?

A sweep from starts $s_c$ returns a trajectory with one error per chunk: the *defect*
$d_c = F_{c-1}(s_{c-1}) - s_c$ at its start. The error $E_c$ of the start obeys, to first order,

$$E_{c+1} = J_c E_c + d_{c+1}, \qquad E_0 = 0,$$

with the true Jacobian $J_c$ of the chunk. A correction solves this with the approximation $A_c$
that its method uses, $δ_{c+1} = A_c δ_c + d_{c+1}$. What the approximation leaves unexplained,
$ε = E - δ$, obeys

$$ε_{c+1} = J_c ε_c + (J_c - A_c) δ_c.$$

The effect of $J_c$ is *measured*, by a second trajectory whose chunks start from displaced starts:
no derivative is believed, since the structure may be declared wrongly and a custom derivative may
not be one. So a start is accepted if $|δ| + |ε|$ and $|d|$ are at most the tolerance, element by
element, where the tolerance includes what the chunk before makes of rounding (`_tolerance.py`), and
for $δ$ the rounding of all chunks before: this is a backward error, so that a network that
amplifies its rounding, or remembers it, can be at rest, while a drift of less than the rounding of
one chunk adds up in $δ$ or in $ε$. Rates of convergence end an iteration that gets nowhere; they
accept nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._misc import finite_or
from .._one_device import OneDevice
from ..scans import AbstractScan
from ..structures import Diagonal

# Starts are displaced by this many tolerances, so that rounding does not hide their effect.
_DISPLACEMENT = 8.0
# An approximation is confirmed where it misses at most this part of a displacement, and rounding.
_CONFIRMED = 1 / 64
# A chunk that retains more than this part of a displacement is taken to retain all.
_LEAKY = 0.9
# Give up after this many iterations in which no more than the guaranteed chunk became right and the
# errors of the others did not shrink either.
_PATIENCE = 15
# The mean logarithm of the errors must fall by this much to count as progress: less is noise.
_LOWER = 0.05
# Beyond this, an error is as bad as any: keeps its logarithm finite.
_HOPELESS = 1e30


class StepReport(NamedTuple):
    """The report of a method about its correction.

    - `accepted`: the correction starts from the point that was swept last, not an earlier one.
    - `descended`: a merit function of the method decreased.
    """

    accepted: Bool[Array, ""] | bool = True
    descended: Bool[Array, ""] | bool = False


def displacements(
    starts: Float[Array, "n size"],
    defects: Float[Array, "n size"],
    tolerance: Float[Array, "n size"],
) -> Float[Array, "n size"]:
    """By how much to displace each start to measure the effect of its chunk's Jacobian.

    In the direction of the running sum of the defects, because a slow drift that hides behind
    rounding shows in the sum first.

    **Arguments:**

    - `starts`: the starts of the chunks, or states inside of them.
    - `defects`: of these or of earlier starts.
    - `tolerance`: of each element by its own magnitude.
    """
    defects = finite_or(defects, 0.0).astype(tolerance.dtype)
    # Elements that are small because larger ones cancel carry the rounding of these; but no defect
    # of another kind, before which everything would look forgotten.
    largest = [jnp.max(jnp.abs(x), axis=0, keepdims=True) for x in (defects, tolerance)]
    size = _DISPLACEMENT * jnp.maximum(tolerance, jnp.minimum(*largest))
    return jnp.where(jax.lax.cumsum(defects) < 0, -size, size).astype(starts.dtype)


class Unexplained(NamedTuple):
    """The error that a correction leaves at each start, a bound of $|ε|$; and the rounding of all
    previous chunks, as far as it is retained and the linearization is confirmed."""

    error: Float[Array, "chunks size"]
    rounding: Float[Array, "chunks size"]


def unexplained(
    displaced: Float[Array, "chunks size"],
    response: Float[Array, "chunks size"],
    predicted: Float[Array, "chunks size"],
    rounding: Float[Array, "chunks size"],
    correction: Float[Array, "chunks size"],
    scan: AbstractScan,
) -> Unexplained:
    """Propagates what the linearization leaves out, by what was measured.

    **Arguments:**

    - `displaced`: by how much the starts were displaced.
    - `response`: by how much the ends moved, $J v$.
    - `predicted`: by how much they should move, $A v$.
    - `rounding`: what rounding makes of the ends.
    - `correction`: $|δ|$.
    - `scan`: of the linear recurrence over the chunks.
    """
    size = jnp.maximum(jnp.abs(displaced), float(jnp.finfo(displaced.dtype).tiny))
    parts = jnp.abs(jnp.stack([response, response - predicted])) / jnp.expand_dims(size, 0)
    # Rounding must not make a perfect memory look like a leaky one; and no chunk retains more than
    # all, or a single one that expands would spoil all that follow.
    retained, missed = jnp.where(parts < _LEAKY, parts, 1)
    # In long chunks, rounding may be as large as a displacement: then it confirms nothing.
    confirmed = missed * size <= _CONFIRMED * size + jnp.minimum(rounding, size / 4)
    # Rounding is independent from chunk to chunk: its variances add up.
    matrices = jnp.concatenate([retained, retained**2], axis=1)
    offsets = jnp.where(confirmed, 0, missed * correction), jnp.where(confirmed, rounding**2, 0)
    offsets = jnp.concatenate(offsets, axis=1)
    error, variance = jnp.split(scan.prefix_states(Diagonal(), matrices, offsets), 2, axis=1)
    return Unexplained(error, jnp.sqrt(variance))


class Progress(NamedTuple):
    """The progress of an iteration.

    - `front`: the first chunk whose start is not accepted.
    - `level`: the mean logarithm of the errors behind what is exact by induction, the smallest so
        far.
    - `stalled`: how many iterations made no progress.
    """

    front: Int[Array, ""]
    level: Float[Array, ""]
    stalled: Int[Array, ""]

    @classmethod
    def none(cls) -> "Progress":
        return cls(jnp.asarray(0), jnp.asarray(jnp.inf, jnp.float32), jnp.asarray(0))

    @property
    def is_patient(self) -> Bool[Array, ""]:
        return self.stalled < _PATIENCE

    def updated(
        self, front: Int[Array, ""], level: Float[Array, ""], descended: Bool[Array, ""] | bool
    ) -> "Progress":
        """After one more iteration. It made progress if the errors shrank, if more chunks became
        right than the one that is guaranteed to, or if the method's merit `descended`."""
        nearer = (level < self.level - _LOWER) | (front > self.front + 1)
        if descended is not False:
            nearer |= descended
        stalled = jnp.where(nearer, 0, self.stalled + 1)
        return Progress(front, jnp.minimum(level, self.level), stalled)


class Summary(NamedTuple):
    """The verdict on all chunks, on all devices.

    - `front`: the index of the first chunk that is not accepted.
    - `level`: the mean logarithm of the errors behind what is exact by induction.
    - `largest`, `correction`: the largest error and correction.
    """

    front: Int[Array, ""]
    level: Float[Array, ""]
    largest: Float[Array, ""]
    correction: Float[Array, ""]


def summarize(
    errors: Float[Array, " chunks"],
    correction: Float[Array, ""],
    pinned: Bool[Array, " chunks"],
    shards: OneDevice,
) -> Summary:
    """Reduces the errors, in units of the tolerance, in one exchange between devices; `pinned` are
    the starts that are exact by induction."""
    count = len(errors)
    positions = shards.positions(count)
    uncertain = (~pinned).astype(jnp.float32)
    logs = uncertain * jnp.log(jnp.minimum(jnp.maximum(errors, 1), _HOPELESS))
    # Counted from behind, so that a maximum finds the first.
    behind = (errors > 1).astype(int) * (shards.count * count - positions)
    maxima = [jnp.max(behind).astype(jnp.float32), jnp.max(errors), correction]
    whole = shards.reduce(maxima, [jnp.sum(logs), jnp.sum(uncertain)])
    behind, largest, correction = whole.maxima
    front = shards.count * count - behind.astype(int)
    return Summary(front, whole.sums[0] / jnp.maximum(whole.sums[1], 1), largest, correction)


def first_index(flags: Bool[Array, " n"]) -> Int[Array, ""]:
    """The index of the first true flag; the number of flags if there is none."""
    padded = jnp.concatenate([flags, jnp.ones(1, bool)])
    return jnp.argmax(padded)
