import dataclasses
import math
from typing import ClassVar

from ..structures import AbstractStructure
from ._linearization import Linearization
from ._shooting import AbstractIterativeSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jacobi(AbstractIterativeSolver):
    r"""Jacobi iteration: each chunk starts where the one before it ended in the last sweep,

    $$s_{c+1}^{\text{new}} = F_c(s_c).$$

    No Jacobian at all, hence the cheapest sweep and the least memory. Needs a recurrence that
    forgets its state within a few chunks (fading memory); then two or three sweeps suffice. The
    error shrinks by the chunks' contraction in each iteration, which the stopping rule measures.
    With `chunk_size=1` this is the Jacobi iteration of Song et al. (*Accelerating feedforward
    computation via parallel nonlinear equation solving*, ICML 2021, algorithm 1); with larger
    chunks it is parareal without a coarse model.

    `chunk_size=None` is an eighth of the length, but at least 16 and at most 256; on an accelerator
    it is 32.

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the arguments.
    """

    accelerator_chunk_size: ClassVar[int | None] = 32

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        return Linearization.zero()

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return max(16, min(256, math.ceil(length / 8)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard(AbstractIterativeSolver):
    r"""Picard iteration: the Jacobian of each chunk is replaced by the identity,

    $$s_{c+1}^{\text{new}} = F_c(s_c) + (s_c^{\text{new}} - s_c),$$

    a cumulative sum over the chunks. Suits steps that change the state a little, such as small
    steps of a differential equation (Shih et al., *Parallel sampling of diffusion models*, NeurIPS
    2023, equation 6). For recurrences that forget, [`pararnn.Jacobi`][] is better.

    `chunk_size=None` is 1: the Jacobian of a long chunk is far from the identity.

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the arguments.
    """

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        return Linearization.identity()

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return 1
