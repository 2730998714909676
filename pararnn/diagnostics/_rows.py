"""The measurements of one solver."""

from typing import NamedTuple

from ..solvers import AbstractSolver
from ._compare import Spread


class Measurement(NamedTuple):
    """Time and cost of a compiled function.

    - `seconds`: the time per call.
    - `ratio`: the time over that of the baseline, round by round.
    - `compile_seconds`: measured once.
    - `temporary_bytes`: the memory beside arguments and results, per device, as the compiler says;
        `None` if it does not.
    - `flops`, `bytes`: with `costs=True`, and on one device only. The bytes are an upper bound, as
        if nothing were fused.
    """

    seconds: Spread
    ratio: Spread
    compile_seconds: float
    temporary_bytes: int | None
    flops: float | None = None
    bytes: float | None = None


class Row(NamedTuple):
    """The measurements of one solver.

    - `name`: the solver's constructor call.
    - `forward`, `gradient`: forward; forward and gradient together, `None` if not measured.
    - `error`: of the states, as [`pararnn.diagnostics.Agreement`][] measures it.
    - `rounding`: whether rounding explains a larger difference.
    - `agrees`: whether `error` is at most 1e-5 in float32 and 1e-10 in float64, and
        `gradient_error`, if measured, at most a hundred times that.
    - `gradient_error`: relative to the largest magnitude in each array; `None` if not measured.
    - `iterations`, `sequential_steps`, `chunk_size`, `fallback`: as in [`pararnn.Stats`][]; `None`
        for the baseline.
    - `solver`: `None` for the default and the baseline.
    """

    name: str
    forward: Measurement
    gradient: Measurement | None
    error: float
    rounding: bool
    agrees: bool
    gradient_error: float | None = None
    iterations: int | None = None
    sequential_steps: int | None = None
    chunk_size: int | None = None
    fallback: bool | None = None
    solver: AbstractSolver | None = None

    @property
    def slowest(self) -> Measurement:
        """Forward and gradient, if measured; it ranks the solvers."""
        return self.forward if self.gradient is None else self.gradient
