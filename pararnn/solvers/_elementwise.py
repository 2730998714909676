import dataclasses

from .._recurrence import Recurrence
from ..jaxprs._elementwise import elementwise_tangents
from ..structures import AbstractStructure
from ..sweeps._base import Step
from ._linearization import Linearization
from ._shooting import AbstractIterativeSolver

# On an accelerator, how many iterations are made before asking whether they are enough: trained
# networks of 128 and 256 units took 7 to 14.
_MIN_ITERS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementwiseNewton(AbstractIterativeSolver):
    r"""Newton's method without the tangents that mix state elements: those through matrix products,
    convolutions, reductions and the like are dropped, read off the step's jaxpr.

    What a trained gated network remembers long, it remembers through its gates, element by element;
    what goes through its weight matrices is forgotten within some steps, over which a sweep carries
    it exactly. So for a GRU, $h' = n + z (h - n)$, the tangent $v$ of a step becomes $z v$, for an
    LSTM each unit has a matrix of 2 x 2, and for an Elman network nothing is left: this is
    [`pararnn.Jacobi`][] then. The correction is an elementwise recurrence, a sweep pushes one or
    two tangents without any matrix product, whatever the width, and the number of iterations grows
    with how long the *mixing* is remembered, not with the length. A step that mixes nothing is
    solved by Newton's method.

    Related: the diagonal of the exact Jacobian ([`pararnn.QuasiNewton`][]; Gonzalez et al.,
    *Towards scalable and stable parallelization of nonlinear RNNs*, NeurIPS 2024), which takes as
    many tangents as Newton's method for a dense cell; and dense recurrences as fixed points of
    diagonal ones (Movahedi et al., *Fixed-point RNNs*, 2025).

    Not for networks that track a state by their weight matrices ([`pararnn.Speculative`][]), nor
    for states that are moved from place to place, as in a delay line.

    `chunk_size=None` is 16, `min_iters=None` on an accelerator 8.

    See [`pararnn.solvers.AbstractIterativeSolver`][] for the arguments.
    """

    def resolved(
        self, recurrence: Recurrence, platform: str | None = None
    ) -> AbstractIterativeSolver:
        solver = super().resolved(recurrence, platform)
        if self.min_iters is None and solver.min_iters and not recurrence.elementwise.is_all:
            return dataclasses.replace(solver, min_iters=_MIN_ITERS)
        return solver

    def differentiated(self, recurrence: Recurrence) -> tuple[Step, AbstractStructure | None]:
        part = recurrence.elementwise
        step = recurrence.step
        return (step if part.is_all else elementwise_tangents(step)), part.structure

    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        return Linearization.exact(structure)

    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        return 16
