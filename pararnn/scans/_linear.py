r"""Linear recurrences $h_t = A_t h_{t-1} + b_t$ with $h_{-1} = 0$, for every Jacobian structure.

The same recurrence, run over chunks instead of steps, is the correction of every Newton-like
method; run backwards with transposed matrices, it is the derivative's.
"""

from jaxtyping import Array, Float

from ..structures import AbstractStructure
from ._base import AbstractScan
from ._named import LinearMethod, as_scan


def linear_recurrence(
    structure: AbstractStructure,
    matrices: Float[Array, "length *matrix"],
    offsets: Float[Array, "length size"],
    *,
    reverse: bool = False,
    method: LinearMethod | AbstractScan | None = None,
) -> Float[Array, "length size"]:
    r"""All $h_t$ of $h_t = A_t h_{t-1} + b_t$; an initial state belongs into `offsets[0]`.

    **Arguments:**

    - `structure`: says how `matrices` are stored and multiplied.
    - `matrices`, `offsets`: $A_t$ and $b_t$ along the leading axis.
    - `reverse`: run from the last element to the first: $h_t = A_t h_{t+1} + b_t$.
    - `method`: `"sequential"` is one `jax.lax.scan`; `"associative"` one
        `jax.lax.associative_scan`; `"radix"` goes through blocks of 16 elements side by side,
        then through their summaries in the same way, then through the blocks again, all unrolled:
        the fewest kernels on an accelerator. Or a scan of your own
        ([`pararnn.scans.AbstractScan`][]). `None` picks by platform.

    **Returns:**

    An array shaped like `offsets`.

    **Raises:**

    `ValueError` for any other `method`.
    """
    scan = as_scan("method", method)
    return scan.affine(structure, matrices, offsets, reverse=reverse)
