import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._norms import all_finite
from ._chunks import Chunks
from ._finish import finish_sequentially


def shoot_once(chunks: Chunks) -> PyTree[Array]:
    """The solution of a recurrence that is affine in the state and starts from zero, by one exact
    correction."""
    recurrence, scan = chunks.recurrence, chunks.scan
    starts = jnp.zeros((chunks.num_chunks, chunks.size), chunks.dtype)
    starts = chunks.shards.place_like(starts, chunks.first_start)
    point = chunks.sweep(starts)
    if chunks.chunk_size > 1:
        propagated = chunks.propagate_defects(point)
        starts = chunks.safeguarded(point, point.incoming + propagated)
        _, states = chunks.trajectory(starts)
        bad = chunks.overflown(point, propagated)
        return finish_sequentially(recurrence, states, bad, chunks.chunk_size)[0]
    used = chunks.linearization.used
    assert used is not None and point.jacobians is not None  # an exact method has both
    solution = scan.affine(used, point.jacobians, point.ends)
    if chunks.length >= scan.accurate_to:
        # The rounding of products grows with their length: once more, for what is missing.
        point = chunks.sweep(chunks.incoming(solution))
        starts = chunks.safeguarded(point, point.incoming + chunks.propagate_defects(point))
        _, states = chunks.trajectory(starts)
    else:
        solution = jnp.flip(solution, 0) if recurrence.reverse else solution
        states = jax.vmap(chunks.unravel)(solution)
    if scan.accurate_to == math.inf:  # no products that might overflow
        return states
    # A product of matrices may overflow where the products with the vector do not.
    finite = all_finite(states, keep_axes=1)
    bad = ~(jnp.flip(finite) if recurrence.reverse else finite)
    return finish_sequentially(recurrence, states, bad, chunks.chunk_size)[0]
