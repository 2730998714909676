"""Structures of a step's Jacobian, and the arithmetic of the matrices that have them.

A structure is a partition of the state's elements into groups that do not influence each other
within a step. Matrices of one structure are closed under products, so the Jacobian of a whole chunk
of steps has the structure of one step's. Three storage forms exist: `Diagonal` (groups of one),
`BlockDiagonal` (groups of equal or different sizes, at any positions) and `Dense` (one group).
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Up to this block size, products are written as sums of elementwise products: XLA fuses them into
# the surrounding kernel, where a batched matrix product would be one of its own. One term after
# another, as a reduction over so short an axis is not vectorised on a CPU.
_UNROLL_BLOCK_SIZE = 8
_HIGHEST = jax.lax.Precision.HIGHEST


def _matmul(a: Float[Array, "... i k"], b: Float[Array, "... k j"]) -> Float[Array, "... i j"]:
    if a.shape[-1] <= _UNROLL_BLOCK_SIZE:
        columns = (jnp.expand_dims(a[..., j], -1) for j in range(a.shape[-1]))
        rows = (jnp.expand_dims(b[..., j, :], -2) for j in range(a.shape[-1]))
        return functools.reduce(jnp.add, map(jnp.multiply, columns, rows))
    return jnp.matmul(a, b, precision=_HIGHEST)


def _matvec(a: Float[Array, "... i k"], v: Float[Array, "... k"]) -> Float[Array, "... i"]:
    return jnp.squeeze(_matmul(a, jnp.expand_dims(v, -1)), -1)


def _identity(like: Float[Array, "... k k"]) -> Float[Array, "... k k"]:
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _gauss_jordan(matrix: Float[Array, "... k k"]) -> Float[Array, "... k k"]:
    """The inverse of symmetric positive definite matrices, for which elimination needs no pivoting.

    By hand, because several batched LAPACK solves in one program can deadlock on the CPU, and
    because on a GPU they are a library call per matrix size.
    """
    k = matrix.shape[-1]
    index = jnp.arange(k)

    def eliminate(p, m):
        pivot_row = jnp.take(m, p, axis=-2)
        pivot_column = jnp.take(m, p, axis=-1)
        pivot = jnp.expand_dims(jnp.take(pivot_row, p, axis=-1), -1)
        scaled_row = pivot_row / pivot
        outer = jnp.expand_dims(pivot_column, -1) * jnp.expand_dims(scaled_row, -2)
        is_row, is_column = jnp.expand_dims(index == p, -1), jnp.expand_dims(index == p, 0)
        lead = tuple(range(m.ndim - 2))
        is_row, is_column = jnp.expand_dims(is_row, lead), jnp.expand_dims(is_column, lead)
        eliminated = m - outer
        eliminated = jnp.where(is_row, jnp.expand_dims(scaled_row, -2), eliminated)
        column = -jnp.expand_dims(pivot_column / pivot, -1)
        corner = jnp.expand_dims(1 / pivot, -1)
        return jnp.where(is_column, jnp.where(is_row, corner, column), eliminated)

    return jax.lax.fori_loop(0, k, eliminate, matrix)


class AbstractStructure(abc.ABC):
    """What is known of the zero pattern of `∂f/∂state`, the state raveled to a vector.

    Instances are immutable and hashable. "matrix" below is the structure's own storage form; every
    method accepts any number of leading batch axes.
    """

    @abc.abstractmethod
    def num_seeds(self, size: int) -> int:
        """How many tangents recover a matrix of this structure."""

    @abc.abstractmethod
    def seeds(self, size: int, dtype: np.dtype) -> Float[np.ndarray, "seeds size"]:
        """The tangents to push through a step so that `compress` can recover its Jacobian."""

    @abc.abstractmethod
    def compress(self, tangents: Float[Array, "... seeds size"]) -> Float[Array, "..."]:
        """The matrix from the images of `seeds`."""

    @abc.abstractmethod
    def apply(self, matrix: Float[Array, "..."], vector: Float[Array, "... size"]) -> Array:
        """Matrix times vector."""

    @abc.abstractmethod
    def compose(self, later: Float[Array, "..."], earlier: Float[Array, "..."]) -> Array:
        """The product `later @ earlier`."""

    @abc.abstractmethod
    def transpose(self, matrix: Float[Array, "..."]) -> Float[Array, "..."]:
        """The transposed matrix, in the same structure."""

    @abc.abstractmethod
    def identity(self, like: Float[Array, "..."]) -> Float[Array, "..."]:
        """Identity matrices, as many as `like` holds."""

    @abc.abstractmethod
    def inverse(self, matrix: Float[Array, "..."]) -> Float[Array, "..."]:
        """The inverse of a symmetric positive definite matrix."""

    @abc.abstractmethod
    def diagonal(self, matrix: Float[Array, "..."]) -> Float[Array, "... size"]:
        """The diagonal of a matrix."""

    @abc.abstractmethod
    def to_dense(self, matrix: Float[Array, "..."]) -> Float[Array, "... size size"]:
        """The same matrix as a full two-dimensional array."""

    def restrict(self, source: "AbstractStructure", matrix: Float[Array, "..."]) -> Array:
        """The part of a matrix of structure `source` that has this structure; the rest is dropped.
        For a structure that a solver keeps of a larger one; raises a `ValueError` by default."""
        raise ValueError(f"Cannot restrict {type(source).__name__} matrices to {self!r}.")

    def check(self, size: int) -> None:
        """Raises a `ValueError` if the structure cannot describe a state of `size` elements."""
        return  # unless a structure says otherwise, it describes states of any size

    def labels(self, size: int) -> np.ndarray:
        """For each state element the number of its group: elements of different groups do not
        influence each other. One group of all, unless a structure says otherwise."""
        return np.zeros(size, int)


@dataclasses.dataclass(frozen=True)
class Diagonal(AbstractStructure):
    """Every state element depends on itself alone. Stored as the diagonal, shape `(size,)`."""

    def labels(self, size):
        return np.arange(size)

    def num_seeds(self, size):
        return 1

    def seeds(self, size, dtype):
        return np.ones((1, size), dtype)

    def compress(self, tangents):
        return jnp.squeeze(tangents, -2)

    def apply(self, matrix, vector):
        return matrix * vector

    def compose(self, later, earlier):
        return later * earlier

    def transpose(self, matrix):
        return matrix

    def identity(self, like):
        return jnp.ones_like(like)

    def inverse(self, matrix):
        return 1 / matrix

    def diagonal(self, matrix):
        return matrix

    def restrict(self, source, matrix):
        return source.diagonal(matrix)

    def to_dense(self, matrix):
        shape = (*matrix.shape, matrix.shape[-1])
        column = jnp.broadcast_to(jnp.expand_dims(matrix, -1), shape)
        return column * _identity(column)


@dataclasses.dataclass(frozen=True)
class Dense(AbstractStructure):
    """Nothing is known: every element may depend on every other. Stored as `(size, size)`."""

    def num_seeds(self, size):
        return size

    def seeds(self, size, dtype):
        return np.eye(size, dtype=dtype)

    def compress(self, tangents):
        return jnp.swapaxes(tangents, -1, -2)

    def apply(self, matrix, vector):
        return _matvec(matrix, vector)

    def compose(self, later, earlier):
        return _matmul(later, earlier)

    def transpose(self, matrix):
        return jnp.swapaxes(matrix, -1, -2)

    def identity(self, like):
        return _identity(like)

    def inverse(self, matrix):
        return _gauss_jordan(matrix)

    def diagonal(self, matrix):
        return jnp.diagonal(matrix, axis1=-2, axis2=-1)

    def restrict(self, source, matrix):
        return source.to_dense(matrix)

    def to_dense(self, matrix):
        return matrix


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(AbstractStructure):
    """Disjoint groups of state elements; an element depends only on its own group.

    Stored as `(groups, k, k)` with `k` the size of the largest group; smaller groups are padded
    with zeros.

    **Arguments:**

    - `groups`: a tuple with one tuple of element indices per group. The indices count the
        elements of the raveled state (leaves in pytree order, complex leaves as real part then
        imaginary part), and each must occur exactly once.
    """

    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if not self.groups or any(len(g) == 0 for g in self.groups):
            raise ValueError("`groups` must hold at least one group, and no empty ones.")
        indices = sorted(i for g in self.groups for i in g)
        if indices != list(range(len(indices))):
            raise ValueError(
                "`groups` must contain each index 0, 1, …, size-1 exactly once; "
                f"got {len(indices)} indices from {indices[0]} to {indices[-1]}."
            )

    @classmethod
    def contiguous(cls, num_blocks: int, block_size: int) -> "BlockDiagonal":
        """Neighbouring elements form a block, as for the heads of a multi-head cell."""
        index = np.arange(num_blocks * block_size).reshape(num_blocks, block_size)
        return cls(tuple(map(tuple, index.tolist())))

    @classmethod
    def interleaved(cls, num_blocks: int, block_size: int) -> "BlockDiagonal":
        """Elements `g, g + num_blocks, g + 2 num_blocks, …` form block `g`, as for a diagonal
        LSTM: each hidden unit couples its own element of `c` and of `h`."""
        index = np.arange(num_blocks * block_size).reshape(block_size, num_blocks).T
        return cls(tuple(map(tuple, index.tolist())))

    def check(self, size):
        covered = sum(map(len, self.groups))
        if covered != size:
            raise ValueError(
                f"`structure` describes a state of {covered} elements, but the state has {size}."
            )

    def labels(self, size):
        members, position, _ = self._layout
        return position // members.shape[1]

    @functools.cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """`members[g, j]`: the j-th element of group g (`size` where padded); `position[i]`:
        where element `i` stands in the flattened `members`; whether anything is padded."""
        size, k = sum(map(len, self.groups)), max(map(len, self.groups))
        members = np.full((len(self.groups), k), size)
        position = np.empty(size, int)
        for g, group in enumerate(self.groups):
            members[g, : len(group)] = group
            position[list(group)] = g * k + np.arange(len(group))
        return members, position, members.size > size

    def _gather(self, vector: Float[Array, "... size"]) -> Float[Array, "... groups k"]:
        members, _, padded = self._layout
        if padded:
            vector = jnp.concatenate([vector, jnp.zeros_like(vector[..., :1])], axis=-1)
        return vector[..., members]

    def _scatter(self, grouped: Float[Array, "... groups k"]) -> Float[Array, "... size"]:
        members, position, _ = self._layout
        return grouped.reshape(*grouped.shape[:-2], members.size)[..., position]

    def num_seeds(self, size):
        return self._layout[0].shape[1]

    def seeds(self, size, dtype):
        members, position, _ = self._layout
        k = members.shape[1]
        return (position % k == np.arange(k)[:, None]).astype(dtype)

    def compress(self, tangents):
        columns = self._gather(tangents)  # (..., j, g, i): row i of column j of block g
        return jnp.moveaxis(columns, -3, -1)

    def apply(self, matrix, vector):
        return self._scatter(_matvec(matrix, self._gather(vector)))

    def compose(self, later, earlier):
        return _matmul(later, earlier)

    def transpose(self, matrix):
        return jnp.swapaxes(matrix, -1, -2)

    def identity(self, like):
        return _identity(like)

    def inverse(self, matrix):
        return _gauss_jordan(matrix)

    def diagonal(self, matrix):
        return self._scatter(jnp.diagonal(matrix, axis1=-2, axis2=-1))

    def restrict(self, source, matrix):
        members, _, padded = self._layout
        matrix = source.to_dense(matrix)
        if padded:
            matrix = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, 1)] * 2)
        return matrix[..., members[:, :, None], members[:, None, :]]

    def to_dense(self, matrix):
        size = self._layout[1].size
        shape = (*matrix.shape[:-3], size)
        basis = jnp.eye(size, dtype=matrix.dtype)
        return jax.vmap(
            lambda column: self.apply(matrix, jnp.broadcast_to(column, shape)), out_axes=-1
        )(basis)
