r"""Levenberg–Marquardt: Newton's correction with a penalty on its size.

With the unknown corrections $δ_1, …, δ_N$ of the chunk starts and $δ_0 = 0$, the step minimises

$$\sum_i \lVert δ_i - A_{i-1} δ_{i-1} - r_i \rVert^2 + μ \sum_i \lVert δ_i \rVert^2,$$

which is the smoothing problem of a linear Gaussian model with unit process noise and observations
$δ_i ≈ 0$ of variance $1/μ$ (Gonzalez et al., *Towards scalable and stable parallelization of
nonlinear RNNs*, NeurIPS 2024, section 4.2: ELK). It is solved by a Kalman filter, in the
associative form of Särkkä and García-Fernández (*Temporal parallelization of Bayesian smoothers*,
IEEE Transactions on Automatic Control 2021, lemma 8), and a Rauch–Tung–Striebel smoother, which is
a linear recurrence run backwards.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._misc import bool_where
from .._one_device import OneDevice
from .._validate import check_tolerance
from ..scans import AbstractScan
from ..structures import AbstractStructure, Diagonal
from ._chunks import Chunks, Point, where_finite
from ._convergence import StepReport
from ._iteration import Correction
from ._linearization import Linearization
from ._shooting import AbstractIterativeSolver

# Adaptive damping: where it starts, what it is multiplied by when a correction is accepted or
# rejected, and its bounds.
_FIRST_DAMPING = 1e-2
_DOWN, _UP = 0.1, 4.0
_LEAST, _MOST = 1e-8, 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(AbstractIterativeSolver):
    r"""Newton's method, damped where a full step would not lower the defects ("ELK").

    Each iteration minimises the linearised defects plus $μ$ times the squared size of the
    correction, exactly. With `damping=None`, $μ$ adapts: a correction that lowers the sum of
    squared defects is accepted, and $μ$ shrinks; another is rejected, and $μ$ grows. For systems
    near the edge of chaos, where Newton's first corrections explode.

    **Arguments:**

    - `damping`: a constant $μ$ ($1/σ^2$ in the notation of ELK), or `None` to adapt it.
    - `diagonal`: whether to keep only the diagonal of the chunks' Jacobians ("quasi-ELK").

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the others. `chunk_size=None` is 1 for
    diagonal structures, and about the square root of the length for dense ones.
    """

    damping: float | None = None
    diagonal: bool = False
    damped: ClassVar[bool] = True
    accelerator_chunk_size: ClassVar[int | None] = 32

    def __post_init__(self):
        super().__post_init__()
        if self.damping is not None:
            check_tolerance("damping", self.damping)
        if not isinstance(self.diagonal, bool):
            raise TypeError(f"`diagonal` must be True or False; got {self.diagonal!r}.")

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        return Linearization.restricted(structure, Diagonal() if self.diagonal else structure)

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return max(1, math.isqrt(length)) if structure.num_seeds(size) > 1 else 1

    def init(self, chunks: Chunks, starts: Float[Array, "chunks size"]) -> Any:
        if self.damping is not None:
            return None
        shapes = jax.eval_shape(chunks.sweep, starts)
        empty = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        empty = empty._replace(starts=starts, incoming=starts)
        infinite = jnp.asarray(jnp.inf, starts.dtype)
        return _Search(jnp.asarray(_FIRST_DAMPING, starts.dtype), empty, infinite)

    def correct(self, chunks: Chunks, point: Point, state: Any) -> Correction:
        if self.damping is not None:
            damping = jnp.asarray(self.damping, point.starts.dtype)
            return Correction(point, _damped_starts(chunks, point, damping), state)
        merit = _merit(point, chunks.shards)
        accepted = merit < state.merit
        point, merit = bool_where(accepted, (point, merit), (state.best, state.merit))
        factor = jnp.where(accepted, _DOWN, _UP).astype(state.damping.dtype)
        damping = jnp.clip(state.damping * factor, _LEAST, _MOST)
        starts = _damped_starts(chunks, point, damping)
        step_report = StepReport(accepted, descended=accepted)
        return Correction(point, starts, _Search(damping, point, merit), step_report)


class _Search(NamedTuple):
    """Adaptive damping: the last value of it, and the accepted point with its merit."""

    damping: Float[Array, ""]
    best: Point
    merit: Float[Array, ""]


def _merit(point: Point, shards: OneDevice) -> Float[Array, ""]:
    """The sum of squared defects; infinite if any is not finite."""
    merit = shards.psum(jnp.sum(jnp.square(point.defects)))
    return jnp.where(jnp.isfinite(merit), merit, jnp.inf)


def _damped_starts(chunks: Chunks, point: Point, damping: Float[Array, ""]) -> Array:
    used = chunks.linearization.used
    assert used is not None and point.jacobians is not None  # `linearization` above has both
    jacobians, defects = where_finite(point.jacobians, 0), where_finite(point.defects, 0)
    matrices = chunks.shards.shift_right(jacobians)
    delta = damped_correction(used, matrices, defects, damping, chunks.scan)
    return chunks.safeguarded(point, point.starts + delta)


class _Filter(NamedTuple):
    """An element of the parallel Kalman filter, in the notation of the source."""

    a: Array
    b: Array
    c: Array
    eta: Array
    j: Array


def damped_correction(
    structure: AbstractStructure,
    matrices: Float[Array, "n *matrix"],
    defects: Float[Array, "n size"],
    damping: Float[Array, ""],
    scan: AbstractScan,
) -> Float[Array, "n size"]:
    """The minimiser $δ_1, …, δ_n$ for $μ$ = `damping`; `matrices[i]` maps $δ_i$ to $δ_{i+1}$, and
    the first of all is without effect, because $δ_0 = 0$."""
    identity = structure.identity(matrices)
    gain = damping / (1 + damping)
    first = scan.shards.positions(defects.shape[0]) == 0
    first = jnp.expand_dims(first, tuple(range(1, matrices.ndim)))
    a = jnp.where(first, 0, matrices)
    transposed = structure.transpose(a)
    elements = _Filter(
        a=(1 - gain) * a,
        b=(1 - gain) * defects,
        c=(1 - gain) * identity,
        eta=-gain * structure.apply(transposed, defects),
        j=gain * structure.compose(transposed, a),
    )

    def combine(earlier: _Filter, later: _Filter) -> _Filter:
        return _combine(structure, earlier, later)

    filtered = scan.prefixes(combine, elements)
    means, covariances = filtered.b, filtered.c

    # Smoother: δ_i = m_i + G_i (δ_{i+1} - A_i m_i - r_{i+1}), with G_i = P_i A_iᵀ (A_i P_i A_iᵀ +
    # I)⁻¹.
    # Nothing follows the last.
    a, r = (scan.shards.shift_left(x, jnp.zeros_like(x[0])) for x in (matrices, defects))
    cross = structure.compose(covariances, structure.transpose(a))
    predicted = structure.compose(a, cross) + identity
    gains = structure.compose(cross, structure.inverse(predicted))
    offsets = means - structure.apply(gains, structure.apply(a, means) + r)
    return scan.affine(structure, gains, offsets, reverse=True)


def _combine(s: AbstractStructure, earlier: _Filter, later: _Filter) -> _Filter:
    # (I + C J)⁻¹ = (C⁻¹ + J)⁻¹ C⁻¹: both inverses are of symmetric positive definite matrices.
    precision = s.inverse(earlier.c)
    x = s.compose(s.inverse(precision + later.j), precision)
    ax = s.compose(later.a, x)
    aty = s.compose(s.transpose(earlier.a), s.transpose(x))
    return _Filter(
        a=s.compose(ax, earlier.a),
        b=s.apply(ax, earlier.b + s.apply(earlier.c, later.eta)) + later.b,
        c=s.compose(s.compose(ax, earlier.c), s.transpose(later.a)) + later.c,
        eta=s.apply(aty, later.eta - s.apply(later.j, earlier.b)) + earlier.eta,
        j=s.compose(s.compose(aty, later.j), earlier.a) + earlier.j,
    )
