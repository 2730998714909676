"""All that is particular to Pallas' Triton backend: another one would replace this file.

Arrays come as matrices, rows by elements. Sizes in registers are powers of two.
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
except ImportError:  # deprecated in JAX 0.11, to be removed: there are no kernels then
    pl = plt = None

# Rows of a product by the matrix units, and the smallest matrix for which they pay.
ROWS = 16
_SMALLEST, _LARGEST = 32, 128
_DEPRECATION = "The Pallas Triton backend is deprecated"


def missing() -> str | None:
    """Why there are no kernels at all, or `None`."""
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
    """Runs a kernel of the references of all operands, then those of all results."""
    if not interpret:
        # Issued when a program is lowered, long after this call has returned.
        warnings.filterwarnings("ignore", _DEPRECATION, DeprecationWarning)

    def pararnn_sweep(*refs):  # its name is the kernel's
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
    """The rows that the running program has, as a column."""
    first = pl.program_id(0) * np.int32(rows)
    return first + lax.broadcasted_iota(np.int32, (rows, 1), 0)


def _columns(start: int, step: int, width: int, shape: tuple[int, ...], axis: int):
    lane = lax.broadcasted_iota(np.int32, shape, axis)
    return np.int32(start) + lane * np.int32(step), lane < width


def load(ref: Any, row: Any, span: Span) -> jax.Array:
    """The elements of a span in a row, or in a column of rows; zero in lanes beyond. Of a span of
    two axes, the matrix, from one row."""
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
    """Writes the lanes of a span into a column of rows, as far as these are valid."""
    shape = array.shape
    column, inside = _columns(span.start, span.steps[0], span.widths[0], shape, 1)
    mask = inside & stretched(valid, shape)
    plt.store(ref.at[stretched(row, shape), column], array, mask=mask)


def sum_dtype(*dtypes: Any) -> Any:
    """The dtype in which products are summed."""
    return np.dtype(np.float64 if np.float64 in dtypes else np.float32)


def by_units(size: int, columns: int, dtype: Any) -> bool:
    """Whether the matrix units multiply by a matrix of this size."""
    return min(size, columns) >= _SMALLEST and dtype != np.float64


def multiplies(size: int, columns: int, dtype: Any) -> bool:
    """Whether there are registers for a product with such a matrix."""
    if by_units(size, columns, dtype):
        return max(size, columns) <= _LARGEST
    return size * columns <= _LARGEST * _SMALLEST


def product(vectors: jax.Array, matrix: jax.Array, interpret: bool) -> jax.Array:
    """The product of rows with a matrix, of no less than float32 accuracy."""
    (rows, size), (_, columns) = vectors.shape, matrix.shape
    wide = sum_dtype(vectors.dtype, matrix.dtype)
    if not by_units(size, columns, wide):
        left = lax.broadcast_in_dim(vectors.astype(wide), (rows, size, columns), (0, 1))
        right = lax.broadcast_in_dim(matrix.astype(wide), (rows, size, columns), (1, 2))
        return jnp.sum(left * right, axis=1)
    if vectors.dtype != matrix.dtype or vectors.dtype == np.float32:
        vectors, matrix = vectors.astype(np.float32), matrix.astype(np.float32)
        # One pass would keep ten bits; three keep all but the last.
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
