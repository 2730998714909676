r"""When an iteration may stop: what its corrections and defects tell of the error that remains.

All numbers here are in units of the tolerance (`_tolerance.py`): a start is right if its error is
at most 1. `changes` below are those of each start in one correction;
the arrays go over the chunks, in the order of time, those of this device if there are several.

Not even Newton's method is trusted to converge quadratically: the structure may be declared
wrongly, and a custom derivative may not be one. So an error is estimated from what was observed,
and the states that are returned are judged once more, by the sweep that computes them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..scans import AbstractScan

# A correction beyond this may still be a transient, whose rate tells nothing.
_EXTRAPOLATE_BELOW = 100.0
# Corrections up to this may be rounding, amplified by a system close to the edge of stability.
_AMPLIFIED_ROUNDING = 10.0
# A correction proves its linearization by removing this much of the defects.
_REMOVED = 0.9
# Give up after this many iterations in which no more than the guaranteed chunk became right and the
# corrections of the others did not shrink either.
_PATIENCE = 15
# The mean logarithm of the corrections must fall by this much to count as progress: less is noise.
_LOWER = 0.05
# Beyond this, a correction is as bad as any: keeps its logarithm finite.
_HOPELESS = 1e30


class Measured(NamedTuple):
    """One correction, measured.

    - `changes`: of each start.
    - `beyond`: what of each is more than the rounding of a few operations.
    - `defect`: the largest of the defects that were corrected.
    - `persistent`: whether the change points the same way as the one before it; asked of a
        quadratic method only.
    - `pinned`: which starts are exact by induction.
    """

    changes: Float[Array, " starts"]
    beyond: Float[Array, " starts"]
    defect: Float[Array, ""]
    persistent: Bool[Array, ""] | bool
    pinned: Bool[Array, " starts"]


class Vouched(NamedTuple):
    """What a method itself says of a correction.

    - `accepted`: it starts from the point that was swept last, and not from an earlier one.
    - `complete`: its size tells the error, as it is not damped.
    - `descended`: by a measure of the method's own, it came nearer.
    """

    accepted: Bool[Array, ""] | bool = True
    complete: Bool[Array, ""] | bool = True
    descended: Bool[Array, ""] | bool = False


class History(NamedTuple):
    """What is remembered of the corrections so far.

    - `correction`, `total`: the largest of the last changes, and their sum.
    - `front`: the first start that the last correction moved.
    - `level`: the mean logarithm of the changes, the smallest so far.
    - `stalled`: how many iterations made no progress.
    - `proven`: whether some correction proved the linearization.
    - `trusted`: whether the corrections themselves prove the convergence.
    """

    correction: Float[Array, ""]
    total: Float[Array, ""]
    front: Float[Array, ""]
    level: Float[Array, ""]
    stalled: Int[Array, ""]
    proven: Bool[Array, ""]
    trusted: Bool[Array, ""]

    @classmethod
    def none(cls) -> "History":
        infinite, zero = (jnp.asarray(x, jnp.float32) for x in (jnp.inf, 0))
        no = jnp.asarray(False)
        return cls(infinite, infinite, zero, infinite, jnp.asarray(0), no, no)

    def restarted(self, restart: Bool[Array, ""]) -> "History":
        """With patience, and proofs, from the beginning. The corrections before still tell the
        rate."""
        none = self.none()
        return self._replace(
            front=jnp.where(restart, none.front, self.front),
            level=jnp.where(restart, none.level, self.level),
            stalled=jnp.where(restart, none.stalled, self.stalled),
            proven=self.proven & ~restart,
        )

    @property
    def is_patient(self) -> Bool[Array, ""]:
        return self.stalled < _PATIENCE


def judge(
    measured: Measured,
    vouched: Vouched,
    history: History,
    *,
    first: Bool[Array, ""],
    quadratic: bool,
    scan: AbstractScan,
) -> tuple[Float[Array, " starts"], History]:
    """The estimated error of each start after a correction, and the history with it.

    `first` tells whether this is the first correction, and `quadratic` whether the linearization is
    meant to be exact.
    """
    changes, beyond, pinned = measured.changes, measured.beyond, measured.pinned
    line, scan = scan.line, scan.local
    # Whatever is to be known of other devices, in one exchange.
    front, chunks = first_moved(changes, pinned), len(changes)
    front = jnp.where(front < chunks, line.index, line.count - 1) * chunks + front
    level_sum, level_count = level_sums(changes, pinned)
    maxima = [jnp.max(changes), measured.defect, -front.astype(jnp.float32)]
    sums = [jnp.sum(changes), jnp.sum(beyond), level_sum, level_count]
    whole, before = line.across(maxima, sums)
    correction, defect, front = whole.maxima[0], whole.maxima[1], -whole.maxima[2]
    total, total_beyond, level_sum, level_count = whole.sums
    # A chunk is as wrong as what arrives from the chunks before it, which adds up where the
    # linearization does not carry it along.
    if quadratic:
        rate = correction / history.correction
        arriving = jnp.maximum(scan.cumulative_max(changes), before.maxima[0])
    else:
        rate = jnp.maximum(correction / history.correction, total / history.total)
        arriving = scan.cumulative_sum(beyond) + before.sums[1]
    known = ~first & vouched.complete & tells_a_rate(rate, correction)
    error = jnp.where(known, remaining_error(arriving, rate), jnp.inf)
    at_rest = total == 0
    proven, trusted = history.proven, jnp.zeros_like(history.trusted)
    if quadratic:
        proven |= proves_linearization(history.correction, defect)
        everywhere = measured._replace(changes=correction, defect=defect)
        noise = vouched.accepted & is_amplified_rounding(everywhere)
        settled = ~first & ((noise & proven) | is_negligible(total))
        error = jnp.where(at_rest | settled | pinned, 0.0, error)
        trusted = ~line.any(~jnp.all(error <= 1))
        # Whether rounding adds up, the check of the returned states finds.
        at_rest |= ~first & vouched.accepted & is_rounding(total_beyond)
    error = jnp.where(at_rest | pinned, 0.0, error)
    level = level_sum / jnp.maximum(level_count, 1)
    nearer = vouched.descended | comes_nearer(front, level, history)
    return error, History(
        correction=correction,
        total=total,
        front=front,
        level=jnp.minimum(level, history.level),
        stalled=jnp.where(nearer, 0, history.stalled + 1),
        proven=proven,
        trusted=trusted,
    )


# --- is it right? -----------------------------------------------------------------------------


def tells_a_rate(rate: Float[Array, ""], correction: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the ratio of two successive corrections is that of a convergence."""
    return (rate < 1) & (correction <= _EXTRAPOLATE_BELOW)


def remaining_error(arriving: Float[Array, " starts"], rate: Float[Array, ""]) -> Array:
    """The sum of the corrections to come, a geometric series at the observed rate."""
    return arriving * rate / (1 - rate)


def is_negligible(total: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether even the sum of the changes of all chunks is below the tolerance."""
    return total <= 1


def is_rounding(beyond: Float[Array, "..."]) -> Bool[Array, ""]:
    """Whether the changes are nothing but the rounding of a few operations."""
    return jnp.all(beyond == 0)


def is_amplified_rounding(measured: Measured) -> Bool[Array, ""]:
    """Whether the changes can be the rounding of a system near the edge of stability, which
    amplifies it, so that Newton's corrections never settle: they are small, without direction, and
    correct defects that are below the tolerance.

    Rounding has no direction, but neither has the drift of a derivative that is not one
    (`stop_gradient`): so the linearization must have proved itself on a larger correction.
    """
    small = jnp.max(measured.changes) <= _AMPLIFIED_ROUNDING
    return small & (measured.defect <= 1) & jnp.logical_not(measured.persistent)


def proves_linearization(
    last_correction: Float[Array, ""], defect: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether the correction before was no rounding, and left little of the defects."""
    large = jnp.isfinite(last_correction) & (last_correction >= _AMPLIFIED_ROUNDING)
    return large & (defect <= (1 - _REMOVED) * last_correction)


# --- does it go on? ---------------------------------------------------------------------------


def first_index(flags: Bool[Array, " n"]) -> Int[Array, ""]:
    """The index of the first true flag; the number of flags if there is none."""
    padded = jnp.concatenate([flags, jnp.ones(1, bool)])
    return jnp.argmax(padded)


def first_moved(changes: Float[Array, " starts"], pinned: Bool[Array, " starts"]) -> Array:
    """The first start that a correction moved, of those that are not exact by induction."""
    return first_index((changes > 1) & ~pinned)


def level_sums(
    changes: Float[Array, " starts"], pinned: Bool[Array, " starts"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the logarithms of the changes, of the starts that are not exact by induction; and
    the number of these."""
    logs = jnp.where(pinned, 0.0, jnp.log(jnp.clip(changes, 1.0, _HOPELESS)))
    return jnp.sum(logs), jnp.sum(~pinned, dtype=logs.dtype)


def comes_nearer(front: Array, level: Float[Array, ""], history: History) -> Bool[Array, ""]:
    """Whether the corrections shrink, or more starts came to rest than the one that is guaranteed
    to."""
    return (level < history.level - _LOWER) | (front > history.front + 1)


# --- is what is returned right? ---------------------------------------------------------------


def is_forgotten(norms: Float[Array, "..."], kept: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether defects of these sizes do not add up to more than the tolerance, of which `kept` is
    left after a chunk: a geometric series. A system that does not forget carries every defect on, a
    drift of a few units in the last place too."""
    return (kept < 1) & (jnp.max(norms) / (1 - kept) <= 1)


def that_add_up(
    forgotten: Bool[Array, ""], norms: Float[Array, "..."], beyond: Float[Array, "..."]
) -> Float[Array, "..."]:
    """What of defects adds up: all of it, or if they are `forgotten` what is more than rounding."""
    return jnp.where(forgotten, beyond, norms)


def contradicted(
    norms: Float[Array, "..."], added_up: Float[Array, "..."], trusted: Bool[Array, ""]
) -> Bool[Array, "..."]:
    """Which starts the sweep that computes the returned states contradicts.

    A slow mode may hide behind a fast one, whose rate is no guide then; but as long as chunks do
    not expand, a chunk is no further off than the sum of the defects before it.

    **Arguments:**

    - `norms`: of the defects.
    - `added_up`: the sum up to each start of what of them adds up.
    - `trusted`: whether the corrections proved the convergence: then defects do not add up.
    """
    return (norms > 1) | ((added_up > 1) & ~trusted)
