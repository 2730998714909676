r"""Speculative shooting: for networks that track a state, where every other iteration is
sequential.

Such a network never forgets which of its few basins it is in, though inside each basin it
contracts. A correction is valid only within a basin, so each sweep of Newton's or any damped method
makes just one more chunk right. Instead, run every chunk from a few *candidates*, one per basin,
and look up afterwards which of these runs are the true one: the enumerative parallel finite-state
machine (Mytkowicz et al., *Data-parallel finite-state machines*, ASPLOS 2014), carried over to
smooth recurrences.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._recurrence import Recurrence
from .._validate import check_positive_int
from ..scans import AbstractScan
from ..structures import AbstractStructure
from ..sweeps._base import Step
from ._chunks import Chunks
from ._fixed_point import Jacobi
from ._linearization import Linearization
from ._newton import Newton
from ._shooting import AbstractIterativeSolver

# Candidates are chosen among about this many states.
_POOL_SIZE = 2048
# Beyond this many state elements, Newton's chunk Jacobians are left out of the verifying sweeps.
_MAX_NEWTON_SIZE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative(AbstractIterativeSolver):
    r"""Guesses the start of every chunk from a table of candidates, then verifies by ordinary
    sweeps.

    1. One sweep from any starts visits the basins. A sample of the states that it passes is run
       through the inputs of one common chunk, so that they differ by their basin and no longer by
       their last inputs; `num_candidates` of them are chosen by farthest-point sampling.
    2. A sweep of every chunk $c$ from every candidate $m$ gives the ends $E_{mc}$; a second one, of
       each chunk from the ends of the chunk before, gives $F_c(E_{m,c-1})$. The $j$ whose $E_{jc}$
       is nearest tells which candidate's run chunk $c$ continues. Ends are compared to ends of the
       same chunk, where the contraction has made each basin a point, so one candidate per basin
       suffices.
    3. These maps between indices are composed over the chunks by an associative scan: no step of
       the network is involved. The index that the true first chunk leads to gives all starts.
    4. Ordinary sweeps with the `corrector`'s linearization polish and verify the starts, and find
       what was missed, as for every other solver.

    Costs about `2 * num_candidates + 4` sweeps' work before step 4, on a critical path of four
    chunks. Pays on an idle accelerator; needs at least one candidate in each basin.

    **Arguments:**

    - `num_candidates`: at least the number of basins (for a word problem, the order of the group;
        half as many again find them all more surely).
    - `corrector`: the solver whose linearization the verifying sweeps use. `None` is
        [`pararnn.Newton`][], or [`pararnn.Jacobi`][] for more than 256 state elements.

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the others. `chunk_size=None` is half of
    the square root of the length, at least 16 and at most 64.
    """

    num_candidates: int = 64
    corrector: AbstractIterativeSolver | None = None

    def __post_init__(self):
        super().__post_init__()
        check_positive_int("num_candidates", self.num_candidates)
        if isinstance(self.corrector, Speculative) or not isinstance(
            self.corrector, AbstractIterativeSolver | None
        ):
            raise TypeError(
                "`corrector` must be an iterative solver such as Newton(), other than Speculative; "
                f"got {self.corrector!r}."
            )

    def differentiated(self, recurrence: Recurrence) -> tuple[Step, AbstractStructure | None]:
        if self.corrector is None:
            return super().differentiated(recurrence)
        return self.corrector.differentiated(recurrence)

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        corrector = self.corrector
        if corrector is None:
            small = structure.num_seeds(size) <= _MAX_NEWTON_SIZE
            corrector = Newton() if small else Jacobi()
        return corrector.linearization(structure, size)

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return max(16, min(64, math.isqrt(length) // 2))

    def refine(self, chunks: Chunks, starts: Float[Array, "chunks size"]):
        if chunks.num_chunks * chunks.shards.count < 3:
            return starts, 0
        candidates = self._candidates(chunks, starts)
        shape = (len(candidates), chunks.num_chunks, chunks.size)
        begin = jnp.broadcast_to(jnp.expand_dims(candidates, 1), shape)
        # One more candidate is where the chunk starts at present; and all runs of the first chunk
        # are the true one.
        begin = jnp.concatenate([jnp.expand_dims(starts, 0), begin])
        begin = jnp.where(jnp.expand_dims(chunks.is_first, (0, 2)), starts, begin)
        table = jax.vmap(chunks.ends)(begin)
        continued = jax.vmap(chunks.ends)(jax.vmap(chunks.incoming)(table))
        following = jax.vmap(_nearest, in_axes=1)(continued, table)  # (chunks, lanes)
        # Of the first chunk, which all runs continue, any will do.
        arrived = _chain(following, chunks.scan)
        via = chunks.shards.shift_right(arrived)
        chosen = chunks.incoming(continued[via, jnp.arange(chunks.num_chunks)])
        return jnp.where(jnp.isfinite(chosen), chosen, starts), 4 * chunks.chunk_size

    def _candidates(self, chunks: Chunks, starts: Array) -> Float[Array, "m size"]:
        chosen = _farthest_points(_canonical(chunks, starts), self.num_candidates)
        if not chunks.shards.is_sharded:
            return chosen
        every = chunks.shards.all_gather(chosen).reshape(-1, chunks.size)
        return _farthest_points(every, self.num_candidates)


def _canonical(chunks: Chunks, starts: Array) -> Float[Array, "pool size"]:
    """States from the second half of all chunks, run through the inputs of the first chunk."""
    _, states = chunks.trajectory(starts)
    vectors = jax.vmap(chunks.ravel)(states)
    step_in_chunk = np.arange(chunks.length) % chunks.chunk_size
    settled = np.flatnonzero(step_in_chunk >= chunks.chunk_size // 2)
    stride = max(1, len(settled) // _POOL_SIZE)
    return chunks.through_first_chunk(vectors[settled[::stride]])


def _farthest_points(points: Float[Array, "n size"], count: int) -> Float[Array, "m size"]:
    """Up to `count` points, each the farthest from those before it (Gonzalez, *Clustering to
    minimize the maximum intercluster distance*, 1985)."""
    points = jnp.where(jnp.isfinite(points), points, 0)
    count = min(count, points.shape[0])

    def distances(i):
        return jnp.sum(jnp.square(points - jnp.expand_dims(points[i], 0)), axis=-1)

    def choose(nearest, _):
        i = jnp.argmax(nearest)
        return jnp.minimum(nearest, distances(i)), i

    _, rest = jax.lax.scan(choose, distances(0), length=count - 1)
    return points[jnp.concatenate([jnp.zeros(1, rest.dtype), rest])]


def _nearest(queries: Float[Array, "m size"], keys: Float[Array, "m size"]) -> Int[Array, " m"]:
    """For each query the index of the nearest key."""
    products = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.expand_dims(jnp.sum(jnp.square(keys), axis=-1), 0) - 2 * products
    return jnp.argmin(jnp.where(jnp.isfinite(distances), distances, jnp.inf), axis=-1)


def _chain(following: Int[Array, "n m"], scan: AbstractScan) -> Int[Array, " n"]:
    """The images of index 0 under the composed index maps."""
    return scan.prefixes(lambda earlier, later: later[earlier], following)[:, 0]
