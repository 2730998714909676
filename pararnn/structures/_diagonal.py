import dataclasses

import jax.numpy as jnp
import numpy as np

from ._base import AbstractStructure
from ._products import identity_like


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

    def as_blocks(self, matrix, vector):
        return jnp.expand_dims(matrix, (-1, -2)), jnp.expand_dims(vector, -1)

    def from_blocks(self, vector):
        return jnp.squeeze(vector, -1)

    def restrict(self, source, matrix):
        return source.diagonal(matrix)

    def to_dense(self, matrix):
        shape = (*matrix.shape, matrix.shape[-1])
        column = jnp.broadcast_to(jnp.expand_dims(matrix, -1), shape)
        return column * identity_like(column)
