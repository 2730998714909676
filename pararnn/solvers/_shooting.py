r"""Iterative solvers: multiple shooting over chunks of the sequence, and its settings.

The sequence is cut into $C$ chunks of $T$ steps; the unknowns are the chunks' *starts*
$s_0, …, s_{C-1}$, of which $s_0$ is known. A sweep runs all chunks side by side and gives their
ends $e_c = F_c(s_c)$ and, if the method wants it, an approximation $A_c$ of $∂F_c/∂s_c$. A
correction solves the linear recurrence

$$δ_{c+1} = A_c δ_c + (e_c - s_{c+1}), \quad δ_0 = 0, \qquad s_{c+1} ← e_c + A_c δ_c,$$

by what arrives, $o_c = A_c δ_c = A_c (o_{c-1} + e_{c-1} - s_c)$.

By induction $s_0, …, s_k$ are exact after $k$ corrections, for *any* $A$: at most $C-1$ corrections
are needed, and a sequential finish from the first chunk that has not converged is always available.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._platform import chosen_platform
from .._recurrence import Recurrence
from .._solution import Stats
from .._validate import check_count, check_positive_int, check_tolerance
from ..scans import AbstractScan
from ..scans._default import check_scan, default_scan
from ..structures import AbstractStructure
from ..sweeps import AbstractSweep, Fused, Scanned
from ..sweeps._base import Step
from ..sweeps._default import check_sweep, default_sweep, uses_kernel
from ._affine import shoot_once
from ._base import AbstractSolver, Report, SolverOutput, check_tangents
from ._chunks import Chunks, Point
from ._finish import finish_sequentially
from ._iteration import (
    Correction,
    Method,
    Trajectory,
    init_iterate,
    iterate_fixed,
    iterate_until_accepted,
    single_chunk,
)
from ._linearization import Linearization

# On an accelerator, how many iterations are made before asking whether they are enough: most
# systems that are worth to be solved in parallel need no more. And how many of those that push many
# tangents, of which one too many costs more than the question.
_MIN_ITERS, _MIN_LARGE_ITERS = 3, 2
# On an accelerator, how many steps early the chunks of a dense recurrence start. What is halved in
# every step is forgotten then, to 2e-10.
_OVERLAP = 32
# So many tangents are few: they become a kernel.
_FEW_SEEDS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractIterativeSolver(AbstractSolver):
    """Multiple shooting: sweep all chunks from guessed starts, correct the starts, repeat.

    Subclasses choose the *linearization*, that is, which approximation of the chunks' Jacobians the
    correction uses, and a default chunk size. They may override `refine`, `init` and `correct`.

    **Arguments:**

    - `rtol`, `atol`: the iteration stops when no element of any chunk's start is off by more than
        `atol + rtol * scale`, with `scale` the magnitude of the element at its own time, and what a
        relative disturbance of the states in the chunk before by `rtol` makes of it: an element is
        not excused by a larger one beside it, nor by what it was long ago, but the rounding that
        the network amplifies is. The error is that of the next correction, and what is measured to
        be missing in it; see [how it works](../how_it_works.md). `rtol=None` is `eps ** 0.8` of the
        state's dtype (2.9e-6 in float32, 3e-13 in float64). Of a state of several dtypes, `rtol` is
        that of the widest, and the others are as many units in the last place less exact.
    - `max_iters`: the most iterations to make before the sequential finish.
    - `chunk_size`: how many steps a chunk has. `None` picks one from the length of the sequence and
        the structure.
    - `fallback`: whether to finish sequentially from the first chunk that did not converge. With
        `False` the result says `not_converged` instead.
    - `linear_method`: the scan that solves the linear recurrence over the chunks, as the `method`
        of [`pararnn.linear_recurrence`][]; `None` picks by platform.
    - `sweep_method`: how the steps of the chunks are made: [`pararnn.sweeps.Scanned`][],
        [`pararnn.sweeps.Unrolled`][], [`pararnn.sweeps.Fused`][], or your own
        [`pararnn.sweeps.AbstractSweep`][]. `None` picks by platform and chunk size: `Fused()`
        if JAX has exactly one CUDA device. The environment variable `PARARNN_KERNELS`, read when
        a program is traced, changes that: 0 disables kernels, 1 enables them with several devices.
    - `overlap`: how many steps early every chunk starts for the first time, at most `chunk_size`: a
        recurrence that forgets its state within these steps needs no iteration. `None` is 0, but
        `min(32, chunk_size)` on an accelerator if the structure is dense.
    - `min_iters`: how many iterations to make before asking whether more are needed. On an
        accelerator each such question waits for the device. `None` is 0 on a CPU, where all
        iterations are asked, and where chunks overlap; elsewhere 3, or 2 if a sweep pushes more
        than 4 tangents.

    Raises `TypeError` or `ValueError`, naming the argument, for values out of range.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iters: int = 100
    chunk_size: int | None = None
    fallback: bool = True
    linear_method: AbstractScan | None = None
    sweep_method: AbstractSweep | None = None
    overlap: int | None = None
    min_iters: int | None = None

    def __post_init__(self):
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)
        check_tolerance("atol", self.atol)
        check_positive_int("max_iters", self.max_iters)
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        if not isinstance(self.fallback, bool):
            raise TypeError(f"`fallback` must be True or False; got {self.fallback!r}.")
        check_scan("linear_method", self.linear_method)
        check_sweep("sweep_method", self.sweep_method)
        for name in ("overlap", "min_iters"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    runs_backwards: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True
    # Whether corrections are shortened, so that they do not converge quadratically even with the
    # exact Jacobians.
    damped: ClassVar[bool] = False
    # Which chunk size `chunk_size=None` stands for on an accelerator, if not the same as elsewhere:
    # there the steps of short chunks are a single kernel, and long ones are launched step by step.
    accelerator_chunk_size: ClassVar[int | None] = None

    def differentiated(self, recurrence: Recurrence) -> tuple[Step, AbstractStructure | None]:
        """The step whose tangents a sweep pushes, and the structure of its Jacobian, `None` if that
        is zero. The step returns what the recurrence's does. By default, those of the recurrence.
        """
        return recurrence.step, recurrence.structure

    @abc.abstractmethod
    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        """The approximation of Jacobians of `size` state elements that have `structure`."""

    @abc.abstractmethod
    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        """The chunk size that `chunk_size=None` stands for, given the length of the sequence and
        the number of state elements."""

    def refine(
        self, chunks: Chunks, starts: Float[Array, "chunks size"]
    ) -> tuple[Float[Array, "chunks size"], int]:
        """Improves the guessed starts before the iteration, at the cost of a number of steps, which
        is returned with them. By default, it does nothing."""
        return starts, 0

    def init(self, chunks: Chunks, starts: Float[Array, "chunks size"]) -> Any:
        """The state that the method carries from correction to correction: a pytree of arrays. By
        default, none."""
        return None

    def correct(self, chunks: Chunks, point: Point, state: Any) -> Correction:
        """The starts that follow from a sweep. By default, the linear recurrence over the chunks
        with the linearization's matrices."""
        propagated = chunks.propagate_defects(point)
        starts = chunks.safeguarded(point, point.incoming + propagated)
        return Correction(point, starts, state, propagated=propagated)

    def with_fallback(self) -> "AbstractIterativeSolver":
        return dataclasses.replace(self, fallback=True)

    def resolved(
        self, recurrence: Recurrence, platform: str | None = None
    ) -> "AbstractIterativeSolver":
        on_cpu = chosen_platform(platform) == "cpu"
        _, structure = self.differentiated(recurrence)
        length, size = recurrence.length, recurrence.size
        chunk_size, sweep = self.chunk_size, self.sweep_method
        if sweep is None and uses_kernel(recurrence.step, recurrence.init, recurrence.xs, platform):
            sweep = Fused()
        seeds = 0 if structure is None else structure.num_seeds(size)
        if chunk_size is None and not on_cpu and self.accelerator_chunk_size is not None:
            chunk_size = self.accelerator_chunk_size
            if sweep == Fused():  # a loop, whose program does not grow with its turns
                chunk_size *= 2
            elif 0 < seeds < min(size, _FEW_SEEDS + 1):  # written out, each takes long to compile
                chunk_size //= seeds
        if chunk_size is None:
            chunk_size = self.default_chunk_size(recurrence.structure, length, size)
        chunk_size = min(chunk_size, length)
        if recurrence.shards.is_sharded:  # only whole chunks can be followed by others
            chunk_size = next(n for n in range(chunk_size, 0, -1) if length % n == 0)
        forgetful = not on_cpu and seeds == size > 1
        overlap = _OVERLAP if forgetful and self.accelerator_chunk_size is not None else 0
        overlap = min(overlap if self.overlap is None else self.overlap, chunk_size)
        min_iters = _MIN_ITERS if seeds <= _FEW_SEEDS else _MIN_LARGE_ITERS
        min_iters = 0 if on_cpu or overlap else min_iters
        return dataclasses.replace(
            self,
            chunk_size=chunk_size,
            linear_method=self.linear_method or default_scan(platform),
            sweep_method=sweep or default_sweep(chunk_size, platform),
            overlap=overlap,
            min_iters=min_iters if self.min_iters is None else self.min_iters,
        )

    def solve(
        self, recurrence: Recurrence, guess: PyTree[Array] | None, report: Report | None = None
    ) -> SolverOutput:
        return self._solve(recurrence, guess, report)

    def _solve(
        self,
        recurrence: Recurrence,
        guess: PyTree[Array] | None,
        report: Report | None = None,
        normwise: bool = False,
    ) -> SolverOutput:
        solver = self.resolved(recurrence)
        overlap, ahead = solver.overlap or 0, min(solver.min_iters or 0, self.max_iters)
        chunks = solver._cut(recurrence, overlap, normwise)
        if chunks.linearization.pushed is not None:
            check_tangents(self, recurrence)
        starts = chunks.guess_early(guess, overlap) if overlap else chunks.guess(guess)
        starts, steps = self.refine(chunks, starts)
        method, steps = self._method(chunks, report), steps + overlap
        iterate = init_iterate(method, chunks, starts)
        if chunks.num_chunks == 1 and not chunks.shards.is_sharded:
            return self._output(chunks, single_chunk(chunks, iterate), steps, last=True)
        if not (overlap or ahead):
            trajectory = iterate_until_accepted(method, chunks, iterate)
            return self._output(chunks, trajectory, steps, last=True)
        first = iterate_fixed(method, chunks, iterate, ahead)

        def resume(_):
            sweep = solver.sweep_method or Scanned()
            # Many tangents become no kernel, and to write their steps out takes long to compile.
            pushed = chunks.linearization.pushed
            dense = pushed is not None and pushed.num_seeds(recurrence.size) > _FEW_SEEDS
            sweep = Scanned(in_place=True) if dense else sweep.small()
            again = dataclasses.replace(solver, sweep_method=sweep)._cut(recurrence, 0, normwise)
            method, made = self._method(again, report), steps + again.chunk_size
            trajectory = iterate_until_accepted(method, again, first.iterate)
            return self._output(again, trajectory, made, last=True)

        return self._output(chunks, first, steps, last=False)._replace(resume=resume)

    def _method(self, chunks: Chunks, report: Report | None) -> Method:
        return Method(
            functools.partial(self.init, chunks),
            functools.partial(self.correct, chunks),
            self.max_iters,
            report,
        )

    def _output(
        self, chunks: Chunks, trajectory: Trajectory, steps: int, last: bool
    ) -> SolverOutput:
        """The output of a solve; after the `last` part, with the sequential finish."""
        iterate, states, bad, pending = trajectory
        if last and self.fallback:
            chunk_size = chunks.chunk_size
            states, finished = finish_sequentially(chunks.recurrence, states, bad, chunk_size)
            converged = jnp.ones_like(pending)
        else:
            converged, finished = ~pending, jnp.asarray(0)
        stats = Stats(
            iterations=iterate.iteration,
            correction=iterate.verdict.correction,
            chunk_size=chunks.chunk_size,
            sequential_steps=steps + (iterate.iteration + 1) * chunks.chunk_size + finished,
            fallback=finished > 0,
        )
        return SolverOutput(states, converged, stats)

    def solve_affine(self, recurrence: Recurrence) -> PyTree[Array]:
        """With the exact Jacobian, one correction from any starts is the solution. Otherwise, the
        iteration; a small element of a derivative may be a difference of large ones inside a step,
        so an error counts by the largest of the elements that influence each other."""
        chunks = self.resolved(recurrence)._cut(recurrence)
        if chunks.is_exact and not self.damped:
            return shoot_once(chunks)
        output = self.with_fallback()._solve(recurrence, None, normwise=True)
        return output.completed(recurrence.shards).states

    def _cut(self, recurrence: Recurrence, window: int = 0, normwise: bool = False) -> Chunks:
        """The chunks of a recurrence that this solver is resolved for."""
        assert self.chunk_size is not None
        step, structure = self.differentiated(recurrence)
        linearization = Linearization.zero()
        if structure is not None:
            linearization = self.linearization(structure, recurrence.size)
        return Chunks(
            recurrence,
            linearization,
            self.chunk_size,
            self.linear_method or default_scan(),
            self.sweep_method or Scanned(),
            self.rtol,
            self.atol,
            tangent_step=step,
            window=window,
            normwise=normwise,
        )
