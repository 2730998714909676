import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._base import AbstractStructure
from ._products import gauss_jordan, identity_like, matmul, matvec


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
        the index of element `i` in the flattened `members`; whether any group is padded."""
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
        return self._scatter(matvec(matrix, self._gather(vector)))

    def compose(self, later, earlier):
        return matmul(later, earlier)

    def transpose(self, matrix):
        return jnp.swapaxes(matrix, -1, -2)

    def identity(self, like):
        return identity_like(like)

    def inverse(self, matrix):
        return gauss_jordan(matrix)

    def diagonal(self, matrix):
        return self._scatter(jnp.diagonal(matrix, axis1=-2, axis2=-1))

    def as_blocks(self, matrix, vector):
        return matrix, self._gather(vector)

    def from_blocks(self, vector):
        return self._scatter(vector)

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
