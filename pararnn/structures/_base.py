"""Structures of a step's Jacobian, and the arithmetic of the matrices that have them.

A structure is a partition of the state's elements into groups that do not influence each other
within a step. Matrices of one structure are closed under products, so the Jacobian of a whole chunk
of steps has the structure of one step's. Three storage forms exist: `Diagonal` (groups of one),
`BlockDiagonal` (groups of equal or different sizes, at any positions) and `Dense` (one group).
"""

import abc

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._products import gauss_jordan, identity_like


class AbstractStructure(abc.ABC):
    """The zero pattern of `∂f/∂state`, the state raveled to a vector, and how such matrices are
    stored.

    Instances are immutable and hashable. "matrix" below is the structure's own storage form; every
    method accepts any number of leading batch axes. Six methods are required. The others have
    defaults, some of which make full matrices of `size × size` elements: those of `transpose`,
    `identity` and `inverse`, which only [`pararnn.LevenbergMarquardt`][] calls, and of `diagonal`,
    which is called where a solver such as [`pararnn.QuasiNewton`][] keeps the diagonal only.
    """

    @abc.abstractmethod
    def num_seeds(self, size: int) -> int:
        """The number of tangents that recover a matrix of this structure."""

    @abc.abstractmethod
    def seeds(self, size: int, dtype: np.dtype) -> Float[np.ndarray, "seeds size"]:
        """The tangents to push through a step so that `compress` can recover its Jacobian."""

    @abc.abstractmethod
    def compress(self, tangents: Float[Array, "... seeds size"]) -> Float[Array, "..."]:
        """The matrix from its products with the `seeds`."""

    @abc.abstractmethod
    def apply(self, matrix: Float[Array, "..."], vector: Float[Array, "... size"]) -> Array:
        """Matrix times vector."""

    @abc.abstractmethod
    def compose(self, later: Float[Array, "..."], earlier: Float[Array, "..."]) -> Array:
        """The product `later @ earlier`."""

    @abc.abstractmethod
    def to_dense(self, matrix: Float[Array, "..."]) -> Float[Array, "... size size"]:
        """The same matrix as a full two-dimensional array."""

    def transpose(self, matrix: Float[Array, "..."]) -> Float[Array, "..."]:
        """The transposed matrix, in the same structure."""
        return self._from_dense(jnp.swapaxes(self.to_dense(matrix), -1, -2))

    def identity(self, like: Float[Array, "..."]) -> Float[Array, "..."]:
        """Identity matrices in the shape of `like`."""
        return self._from_dense(identity_like(self.to_dense(like)))

    def inverse(self, matrix: Float[Array, "..."]) -> Float[Array, "..."]:
        """The inverse of a symmetric positive definite matrix."""
        return self._from_dense(gauss_jordan(self.to_dense(matrix)))

    def diagonal(self, matrix: Float[Array, "..."]) -> Float[Array, "... size"]:
        """The diagonal of a matrix."""
        return jnp.diagonal(self.to_dense(matrix), axis1=-2, axis2=-1)

    def _from_dense(self, full: Float[Array, "... size size"]) -> Float[Array, "..."]:
        """The inverse of `to_dense`."""
        seeds = self.seeds(full.shape[-1], full.dtype)
        highest = jax.lax.Precision.HIGHEST
        return self.compress(jnp.einsum("...ij,sj->...si", full, seeds, precision=highest))

    def as_blocks(
        self, matrix: Float[Array, "..."], vector: Float[Array, "... size"]
    ) -> tuple[Float[Array, "... groups k k"], Float[Array, "... groups k"]] | None:
        """A matrix and a vector as those of independent blocks; `None`, the default, where the
        structure's own arithmetic is as fast."""
        return None

    def from_blocks(self, vector: Float[Array, "... groups k"]) -> Float[Array, "... size"]:
        """The inverse of `as_blocks` for vectors; required if `as_blocks` returns blocks."""
        raise NotImplementedError

    def restrict(self, source: "AbstractStructure", matrix: Float[Array, "..."]) -> Array:
        """The entries of a matrix of structure `source` that this structure has; the others are
        dropped. Required of a structure to which a solver restricts a larger one; raises a
        `ValueError` by default."""
        raise ValueError(f"Cannot restrict {type(source).__name__} matrices to {self!r}.")

    def check(self, size: int) -> None:
        """Raises a `ValueError` if the structure cannot describe a state of `size` elements. By
        default it describes states of any size."""
        return

    def labels(self, size: int) -> np.ndarray:
        """The number of each state element's group: elements of different groups do not influence
        each other. By default, all are in one group."""
        return np.zeros(size, int)
