"""The interface of solvers."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Bool, PyTree

from .._one_device import AxisName, OneDevice
from .._recurrence import Recurrence
from .._solution import Stats

# Called with `(iteration, correction, chunks at rest, chunks)` in every iteration.
Report = Callable[[int, float, int, int], Any]
# The name of the loop that continues a solve which has not converged.
FALLBACK = "pararnn_rest"


class SolverOutput(NamedTuple):
    """The output of a solver.

    - `states`: all states, shape `(L, ...)`.
    - `converged`: whether they are those of the recurrence, judged on the states themselves.
    - `stats`: the report.
    - `resume`: `resume(states)` continues from the states where they have not converged, and
        returns the final output; `None` if there is nothing to continue. It gets the states as an
        argument, because a loop would copy what it closes over.
    """

    states: PyTree[Array]
    converged: Bool[Array, ""]
    stats: Stats
    resume: "Callable[[PyTree[Array]], SolverOutput] | None" = None

    def completed(self, shards: OneDevice) -> "SolverOutput":
        """The output after `resume`, which runs only if it has not converged."""
        resume = self.resume
        if resume is None:
            return self
        first = SolverOutput(self.states, self.converged, self.stats)
        return shards.once_where(~self.converged, first, lambda last: resume(last[0]), FALLBACK)


class AbstractSolver(abc.ABC):
    """A method for solving a recurrence: an immutable, hashable record of hyperparameters, such as
    a frozen dataclass.

    A solver of your own implements `solve` and `solve_affine`; an iterative one is better derived
    from [`pararnn.solvers.AbstractIterativeSolver`][], which has both.
    """

    # Whether it makes one step after another and does nothing else: then steps may use collectives
    # over the batch, and need no derivative.
    stepwise: ClassVar[bool] = False
    # Whether `solve_affine` supports `recurrence.reverse`; for others the inputs are reversed.
    runs_backwards: ClassVar[bool] = False
    # Whether it solves a recurrence whose steps lie on several devices.
    supports_sharding: ClassVar[bool] = False
    # The mesh axis along which it wants time to be sharded.
    axis: ClassVar[AxisName | None] = None

    @abc.abstractmethod
    def solve(
        self, recurrence: Recurrence, guess: PyTree[Array] | None, report: Report | None = None
    ) -> SolverOutput:
        """Solves a recurrence of at least one step.

        **Arguments:**

        - `recurrence`: the problem; its structure is there to be asked for.
        - `guess`: states to start from, shaped like the result, or `None`.
        - `report`: called with `(iteration, correction, chunks at rest, chunks)` in every
            iteration, if there are any.

        **Returns:**

        The output. A solver of which a first part is enough in common cases returns that part, and
        `resume` for the others.
        """

    @abc.abstractmethod
    def solve_affine(self, recurrence: Recurrence) -> PyTree[Array]:
        """Solves a recurrence of at least one step that is affine in the state and starts from
        zero: that of a derivative, which cannot report a failure. Must always return the solution;
        `pararnn.Sequential().solve_affine(recurrence)` is one way."""

    @property
    def inner(self) -> "AbstractSolver | None":
        """The solver that runs on one device or several, `None` if it is to be chosen. By default
        this one."""
        return self

    def with_fallback(self) -> "AbstractSolver":
        """This solver, such that it always ends with the solution: for derivatives, which cannot
        report a failure. By default this one."""
        return self

    def resolved(self, recurrence: Recurrence, platform: str | None = None) -> "AbstractSolver":
        """This solver with all options resolved for a recurrence and a platform (`None` is that of
        JAX). By default itself."""
        return self


def check_sharding(name: str, policy: Any) -> None:
    """Raises a `ValueError` unless a solver, or an adjoint, solves what lies on several devices."""
    if not policy.supports_sharding:
        raise ValueError(
            f"`{name}={type(policy).__name__}(…)` does not say that it solves a recurrence whose "
            "steps lie on several devices (`supports_sharding`)."
        )


def check_tangents(solver: AbstractSolver, recurrence: Recurrence) -> None:
    """Raises a `ValueError` if `solver`, which pushes tangents through the step, cannot."""
    if not recurrence.has_tangents:
        raise ValueError(
            f"`solver={type(solver).__name__}(…)` pushes tangents through `step`, which has no "
            "derivative in forward mode: it uses a `jax.custom_vjp`, a callback or a primitive "
            "without such a rule. Use Jacobi(), Picard() or Sequential(), which need none, or a "
            "`jax.custom_jvp` within `step`."
        )
