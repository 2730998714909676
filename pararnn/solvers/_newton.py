import dataclasses
import math
from typing import ClassVar

from .._validate import check_positive_int
from ..structures import AbstractStructure, BlockDiagonal, Diagonal
from ._linearization import Linearization
from ._shooting import AbstractIterativeSolver


def _default_chunk_size(structure: AbstractStructure, length: int, size: int) -> int:
    if structure.num_seeds(size) == size > 1:
        return max(1, math.isqrt(length))
    return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newton(AbstractIterativeSolver):
    r"""Newton's method with the exact Jacobians of the chunks,

    $$s_{c+1}^{\text{new}} = F_c(s_c) + \frac{∂F_c}{∂s_c} (s_c^{\text{new}} - s_c).$$

    With `chunk_size=1` this is DEER (Lim et al., *Parallelizing non-linear sequential models over
    the sequence length*, ICLR 2024, equation 5) and ParaRNN (Danieli et al., *ParaRNN: Unlocking
    parallel training of nonlinear RNNs for large language models*, 2025); with larger chunks it is
    multiple shooting, which needs fewer iterations and stores one Jacobian per *chunk*. Converges
    quadratically near the solution. Costs as many tangents as the structure has seeds: one for a
    diagonal cell, the number of state elements for a dense one.

    `chunk_size=None` is 1 for diagonal and block-diagonal structures, and about the square root of
    the length for dense ones, so that no more than `sqrt(L)` Jacobians are stored. On an
    accelerator it is 64 in kernels; otherwise 32, divided by the number of tangents if that is at
    most 4.

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the arguments.
    """

    accelerator_chunk_size: ClassVar[int | None] = 32

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        return Linearization.exact(structure)

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return _default_chunk_size(structure, length, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuasiNewton(AbstractIterativeSolver):
    r"""Newton's method with only a part of the chunks' Jacobians: their diagonal ("quasi-DEER",
    Gonzalez et al., *Towards scalable and stable parallelization of nonlinear RNNs*, NeurIPS 2024,
    section 4.1), or their diagonal blocks.

    The correction becomes an elementwise recurrence, at the price of linear convergence. The
    stopping rule measures what the correction leaves out. Sweeps cost as many tangents as Newton's.
    For a step whose structure is diagonal already, it is Newton's method. Derivatives are those of
    the recurrence all the same: the adjoint always uses the true Jacobian.

    **Arguments:**

    - `block_size`: the size of the blocks along the diagonal that are kept, neighbouring elements
        of the raveled state; divides the number of state elements. More than 1 is for dense
        structures.

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the others. `chunk_size=None` chooses as
    [`pararnn.Newton`][] does.
    """

    accelerator_chunk_size: ClassVar[int | None] = 32

    block_size: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_positive_int("block_size", self.block_size)

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        seeds = structure.num_seeds(size)
        if self.block_size == 1 or seeds == 1:
            return Linearization.restricted(structure, Diagonal())
        if seeds < size:
            raise ValueError(
                f"`block_size={self.block_size}` keeps blocks of a dense Jacobian, but this step's "
                f"is {type(structure).__name__}: use Newton(), which keeps all of it, or "
                "`block_size=1`."
            )
        if size % self.block_size:
            raise ValueError(
                f"`block_size` must divide the number of state elements; got {self.block_size} for "
                f"{size}."
            )
        return Linearization.restricted(
            structure, BlockDiagonal.contiguous(size // self.block_size, self.block_size)
        )

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return _default_chunk_size(structure, length, size)
