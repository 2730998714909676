"""The interface to Pallas' Triton backend: a port to another backend replaces this file.

Arrays are matrices, rows × elements. Sizes in registers are powers of two.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._layout import stretched
from ._tiles import Span, lanes_of

try:
    pl: Any = importlib.import_module("jax.experimental.pallas")
    plt: Any = importlib.import_module("jax.experimental.pallas.triton")
except ImportError:  # deprecated in JAX 0.11 and to be removed: without it there are no kernels
    pl = plt = None

# The rows of a product on the matrix units; the smallest matrix for which they pay, and the largest
# for which there are registers.
ROWS = 16
_SMALLEST, _LARGEST = 32, 128
_DEPRECATION = "The Pallas Triton backend is deprecated"


def missing() -> str | None:
    """Why kernels are unavailable, or `None` if they are available."""
    return "needs Pallas' Triton backend, which this release of JAX lacks" if plt is None else None


def launch(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel, which takes references to all operands and then to all results."""
    if not interpret:
        # JAX 0.11 warns when the program is lowered, after this call: a `catch_warnings` is no use.
        # Can go with the backend.
        warnings.filterwarnings("ignore", _DEPRECATION, DeprecationWarning)

    def pararnn_sweep(*refs):  # this name is the kernel's in profiles
        kernel(*refs)

    call = pl.pallas_call(
        pararnn_sweep,
        out_shape=list(results),
        grid=(programs,),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
    )
    return list(call(*operands))


def program_rows(rows: int) -> jax.Array:
    """The indices of the running program's rows, as a column."""
    first = pl.program_id(0) * np.int32(rows)
    return first + lax.broadcasted_iota(np.int32, (rows, 1), 0)


def _columns(start: int, step: int, width: int, shape: tuple[int, ...], axis: int):
    lane = lax.broadcasted_iota(np.int32, shape, axis)
    return np.int32(start) + lane * np.int32(step), lane < width


def load(ref: Any, row: Any, span: Span) -> jax.Array:
    """Loads a span: from one row or a column of rows, or, if it has two axes, a matrix from one
    row. Lanes beyond its width are zero."""
    if len(span.widths) == 2:
        shape = (lanes_of(span.widths[0]), lanes_of(span.widths[1]))
        column, inside = _columns(span.start, span.steps[0], span.widths[0], shape, 0)
        more, inside_too = _columns(0, span.steps[1], span.widths[1], shape, 1)
        column, mask = column + more, inside & inside_too
    else:
        shape = (row.shape[0] if np.ndim(row) else 1, lanes_of(span.widths[0]))
        column, mask = _columns(span.start, span.steps[0], span.widths[0], shape, 1)
    row = stretched(row, shape) if np.ndim(row) else lax.full(shape, row, np.int32)
    exact = all(lanes_of(w) == w for w in span.widths)
    at = ref.at[row, column]
    return plt.load(at) if exact else plt.load(at, mask=mask, other=np.zeros((), ref.dtype)[()])


def store(ref: Any, row: jax.Array, span: Span, array: jax.Array, valid: jax.Array) -> None:
    """Stores the lanes of a span into those rows of a column that are valid."""
    shape = array.shape
    column, inside = _columns(span.start, span.steps[0], span.widths[0], shape, 1)
    mask = inside & stretched(valid, shape)
    plt.store(ref.at[stretched(row, shape), column], array, mask=mask)


def sum_dtype(*dtypes: Any) -> Any:
    """The dtype in which products are accumulated."""
    return np.dtype(np.float64 if np.float64 in dtypes else np.float32)


def by_units(size: int, columns: int, dtype: Any) -> bool:
    """Whether the matrix units compute the product with a matrix of this size."""
    return min(size, columns) >= _SMALLEST and dtype != np.float64


def multiplies(size: int, columns: int, dtype: Any) -> bool:
    """Whether the product with a matrix of this size fits into registers."""
    if by_units(size, columns, dtype):
        return max(size, columns) <= _LARGEST
    return size * columns <= _LARGEST * _SMALLEST


def product(vectors: jax.Array, matrix: jax.Array, interpret: bool) -> jax.Array:
    """The product of rows with a matrix, at least as accurate as in float32."""
    (rows, size), (_, columns) = vectors.shape, matrix.shape
    wide = sum_dtype(vectors.dtype, matrix.dtype)
    if not by_units(size, columns, wide):
        left = lax.broadcast_in_dim(vectors.astype(wide), (rows, size, columns), (0, 1))
        right = lax.broadcast_in_dim(matrix.astype(wide), (rows, size, columns), (1, 2))
        return jnp.sum(left * right, axis=1)
    if vectors.dtype != matrix.dtype or vectors.dtype == np.float32:
        vectors, matrix = vectors.astype(np.float32), matrix.astype(np.float32)
        # One pass of TF32 has ten bits of mantissa; three passes have all but the last of float32.
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    else:
        precision = None
    return lax.dot_general(
        vectors,
        matrix,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if interpret else precision,
        preferred_element_type=np.float32,
    )
