from typing import NamedTuple

from ..structures import AbstractStructure, Diagonal


class Linearization(NamedTuple):
    """The approximation of the chunks' Jacobians that a correction uses. Made by `exact`,
    `restricted`, `identity` or `zero`.

    - `pushed`: the structure whose seeds are pushed through the chunks as tangents; `None` if none
        are.
    - `used`: the structure of the matrices in the correction, a part of `pushed`; `None` for zero
        matrices. Without `pushed`, identity matrices.
    """

    pushed: AbstractStructure | None
    used: AbstractStructure | None

    @classmethod
    def exact(cls, structure: AbstractStructure) -> "Linearization":
        """The true Jacobians, which have `structure`."""
        return cls(structure, structure)

    @classmethod
    def restricted(cls, structure: AbstractStructure, used: AbstractStructure) -> "Linearization":
        """The entries that `used` has, of Jacobians that have `structure`."""
        return cls(structure, used)

    @classmethod
    def identity(cls) -> "Linearization":
        """The identity, without tangents."""
        return cls(None, Diagonal())

    @classmethod
    def zero(cls) -> "Linearization":
        """Zero, without tangents."""
        return cls(None, None)
