import dataclasses

import jax.numpy as jnp
import numpy as np

from ._base import AbstractStructure
from ._products import gauss_jordan, identity_like, matmul, matvec


@dataclasses.dataclass(frozen=True)
class Dense(AbstractStructure):
    """Every element may depend on every other. Stored as `(size, size)`."""

    def num_seeds(self, size):
        return size

    def seeds(self, size, dtype):
        return np.eye(size, dtype=dtype)

    def compress(self, tangents):
        return jnp.swapaxes(tangents, -1, -2)

    def apply(self, matrix, vector):
        return matvec(matrix, vector)

    def compose(self, later, earlier):
        return matmul(later, earlier)

    def transpose(self, matrix):
        return jnp.swapaxes(matrix, -1, -2)

    def identity(self, like):
        return identity_like(like)

    def inverse(self, matrix):
        return gauss_jordan(matrix)

    def restrict(self, source, matrix):
        return source.to_dense(matrix)

    def to_dense(self, matrix):
        return matrix
