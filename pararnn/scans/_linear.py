r"""Linear recurrences $h_t = A_t h_{t-1} + b_t$ with $h_{-1} = 0$, for every Jacobian structure.

Over chunks instead of steps, it is the correction of every Newton-like method; in reverse with
transposed matrices, it is the adjoint.
"""

from jaxtyping import Array, Float

from ..structures import AbstractStructure
from ._base import AbstractScan
from ._default import check_scan, default_scan


def linear_recurrence(
    structure: AbstractStructure,
    matrices: Float[Array, "length *matrix"],
    offsets: Float[Array, "length size"],
    *,
    reverse: bool = False,
    method: AbstractScan | None = None,
) -> Float[Array, "length size"]:
    r"""All $h_t$ of $h_t = A_t h_{t-1} + b_t$; an initial state belongs into `offsets[0]`.

    **Arguments:**

    - `structure`: says how `matrices` are stored and multiplied.
    - `matrices`, `offsets`: $A_t$ and $b_t$ along the leading axis.
    - `reverse`: run from the last element to the first: $h_t = A_t h_{t+1} + b_t$.
    - `method`: the scan: [`pararnn.scans.Sequential`][], [`pararnn.scans.Associative`][],
        [`pararnn.scans.Radix`][], or your own [`pararnn.scans.AbstractScan`][]. `None` is
        `Sequential()` on a CPU and `Radix()` elsewhere.

    **Returns:**

    An array shaped like `offsets`.

    **Raises:**

    `TypeError` if `method` is not a scan.
    """
    check_scan("method", method)
    return (method or default_scan()).affine(structure, matrices, offsets, reverse=reverse)
