from typing import NamedTuple

from ..structures import AbstractStructure


class Linearization(NamedTuple):
    """Which approximation of the chunks' Jacobians a correction uses.

    - `propagated`: the structure whose seeds are pushed through the chunks; `None` for no tangents.
    - `kept`: the structure of the matrices that the correction uses, a part of `propagated`; `None`
        for zero matrices. Without `propagated`, identity matrices.
    """

    propagated: AbstractStructure | None
    kept: AbstractStructure | None

    @property
    def exact(self) -> bool:
        """Whether this is the true Jacobian, so that the iteration converges quadratically, and in
        one correction if the step is affine."""
        return self.propagated is not None and self.kept == self.propagated
