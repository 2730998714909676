"""Structures of a step's Jacobian, and the arithmetic of the matrices that have them.

A structure is a partition of the state's elements into groups that do not influence each other
within a step. Matrices of one structure are closed under products, so the Jacobian of a whole chunk
of steps has the structure of one step's. Three storage forms exist: `Diagonal` (groups of one),
`BlockDiagonal` (groups of equal or different sizes, at any positions) and `Dense` (one group).
"""

import abc

import numpy as np
from jaxtyping import Array, Float


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

    def as_blocks(
        self, matrix: Float[Array, "..."], vector: Float[Array, "... size"]
    ) -> tuple[Float[Array, "... groups k k"], Float[Array, "... groups k"]] | None:
        """A matrix and a vector as those of independent blocks; `None`, the default, where the
        structure's own arithmetic does as well."""
        return None

    def from_blocks(self, vector: Float[Array, "... groups k"]) -> Float[Array, "... size"]:
        """The vector of which `as_blocks` makes this one."""
        raise NotImplementedError

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
