"""Recurrences that need no iteration: affine ones, and those with an algebra."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, PyTree

from .._algebra import AbstractAlgebra
from .._platform import chosen_platform
from .._recurrence import Recurrence
from ..scans import AbstractScan
from ..scans._default import check_scan, default_scan
from ._base import AbstractSolver, check_tangents
from ._newton import Newton
from ._shooting import AbstractIterativeSolver

# A step that takes more is none that one pass solves.
_MAX_ITERS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeScan(AbstractSolver):
    """Composes all steps in one parallel scan, without iterating.

    For steps that are affine in the state (which is detected), such as linear recurrent units,
    gated linear attention and delta rules; and for steps with an algebra, such as the clamps of
    [`pararnn.MinMax`][]. Raises a `ValueError` at trace time for other steps. The result is checked
    against the step, like that of every other solver: what is still missing is solved for again, a
    few times if need be, and finished sequentially where that does not help.

    **Arguments:**

    - `algebra`: an [`pararnn.AbstractAlgebra`][] that contains the steps; `None` is the one
        that is known of the recurrence, as a cell's, or else for affine steps.
    - `linear_method`: how the scan runs, as in [`pararnn.linear_recurrence`][].
    - `corrector`: the solver of affine recurrences, and of what a composition has left; its
        iterations are few. `None` is [`pararnn.Newton`][] with chunks of one step, which on an
        accelerator are longer.
    """

    runs_backwards: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True

    algebra: AbstractAlgebra | None = None
    linear_method: AbstractScan | None = None
    corrector: AbstractIterativeSolver | None = None

    def __post_init__(self):
        check_scan("linear_method", self.linear_method)
        if self.algebra is not None and not isinstance(self.algebra, AbstractAlgebra):
            raise TypeError(
                f"`algebra` must be a pararnn.AbstractAlgebra or None; got {self.algebra!r}."
            )
        if not isinstance(self.corrector, AbstractIterativeSolver | None):
            raise TypeError(
                "`corrector` must be an iterative solver such as Newton(), or None; "
                f"got {self.corrector!r}."
            )

    def solve(self, recurrence, guess, report=None):
        check_tangents(self, recurrence)
        algebra = recurrence.algebra if self.algebra is None else self.algebra
        guess = None
        if algebra is not None:
            guess = self._composed(algebra, recurrence)
        elif not recurrence.is_affine:
            raise ValueError(
                "`solver=AssociativeScan()` needs a `step` that is affine in the state, but its "
                "Jacobian depends on the state. Use Newton(), or pass an `algebra` that has it."
            )
        # An affine recurrence is one correction of Newton's method from anywhere. An algebra may
        # not be the step's, `stop_gradient` can hide a nonlinearity, and the rounding of long
        # products adds up: never trust. What is missing is the next correction, if any is needed.
        return self._corrector().solve(recurrence, guess, report)

    def solve_affine(self, recurrence):
        return self._corrector().solve_affine(recurrence)

    def resolved(self, recurrence, platform=None):
        method = self.linear_method or default_scan(platform)
        solver = dataclasses.replace(self, linear_method=method)
        corrector = solver._corrector(platform).resolved(recurrence, platform)
        return dataclasses.replace(solver, corrector=corrector)

    def _corrector(self, platform: str | None = None) -> AbstractIterativeSolver:
        if self.corrector is not None:
            return self.corrector
        newton = Newton(linear_method=self.linear_method, max_iters=_MAX_ITERS, overlap=0)
        if chosen_platform(platform) == "cpu":
            return dataclasses.replace(newton, chunk_size=1)
        # The first correction is exact, and the second says so.
        return dataclasses.replace(newton, min_iters=2)

    def _composed(self, algebra: AbstractAlgebra, recurrence: Recurrence) -> PyTree[Array]:
        """The states by composition, from the first step on."""
        scan = recurrence.shards.sharded(self.linear_method or default_scan())
        return recurrence.composed(algebra, scan)
