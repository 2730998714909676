"""What every solver does."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Bool, PyTree

from .._devices import once_where
from .._line import AxisName, Line
from .._recurrence import Recurrence
from .._solution import Stats

# Called with `(iteration, correction, chunks at rest, chunks)` in every iteration.
Report = Callable[[int, float, int, int], Any]
# `(states, converged, stats)`, and what makes a better one of its states.
Outcome = tuple[PyTree[Array], Bool[Array, ""], Stats]
Rest = Callable[[PyTree[Array]], Outcome]
# The name of the loop that does the rest. It carries the states: it would copy what it closes over
# and replaces.
REST = "pararnn_rest"


class AbstractSolver(abc.ABC):
    """A method for solving a recurrence: an immutable, hashable record of hyperparameters, such as
    a frozen dataclass.

    A solver of your own implements `solve` and `solve_affine`; an iterative one is better derived
    from [`pararnn.solvers.AbstractIterativeSolver`][], which has both.
    """

    # Whether it makes one step after another and does nothing else: then the sequences of a batch
    # may meet in their steps, and nothing is asked of a step but to be called.
    stepwise: ClassVar[bool] = False
    # Whether `solve_affine` heeds `recurrence.reverse`; the inputs of others are turned around.
    runs_backwards: ClassVar[bool] = False
    # Whether it solves a recurrence whose steps lie on several devices.
    supports_sharding: ClassVar[bool] = False
    # Along which axis of a mesh it asks for that.
    axis: ClassVar[AxisName | None] = None

    @abc.abstractmethod
    def solve(
        self, recurrence: Recurrence, guess: PyTree[Array] | None, report: Report | None = None
    ) -> Outcome:
        """Solves a recurrence of at least one step.

        **Arguments:**

        - `recurrence`: the problem; its structure is there to be asked for.
        - `guess`: states to start from, shaped like the result, or `None`.
        - `report`: called with `(iteration, correction, chunks at rest, chunks)` in every
            iteration, if there are any.

        **Returns:**

        `(states, converged, stats)`: all states; whether they are those of the recurrence, which
        must be judged on the states that are returned; and what happened.
        """

    def attempt(
        self, recurrence: Recurrence, guess: PyTree[Array] | None, report: Report | None = None
    ) -> tuple[Outcome, Rest | None]:
        """The part of `solve` that is enough in common cases, and a function that from its states
        makes the final outcome where they have not converged, or `None` if there is no more to do.
        By default `solve` and nothing else."""
        return self.solve(recurrence, guess, report), None

    @abc.abstractmethod
    def solve_affine(self, recurrence: Recurrence) -> PyTree[Array]:
        """All states of a recurrence of at least one step that is affine in the state and starts
        from zero: that of a derivative, which has no place to report a failure. Must always end
        with the solution; `pararnn.Sequential().solve_affine(recurrence)` is one way."""

    def within(self) -> "AbstractSolver | None":
        """What it solves with, `None` if that is to be chosen. By default itself."""
        return self

    def finishing(self) -> "AbstractSolver":
        """This solver, such that it always ends with the solution, for what cannot report a
        failure. By default itself."""
        return self

    def resolved(self, recurrence: Recurrence, platform: str | None = None) -> "AbstractSolver":
        """This solver with all that it leaves open chosen for a recurrence and a platform (`None`
        is that of JAX): what runs depends on nothing else then. By default itself."""
        return self


def completed(attempted: tuple[Outcome, Rest | None], line: Line) -> Outcome:
    """The outcome of an `attempt`, with the rest where it has not converged; the steps lie as
    `line` says."""
    outcome, rest = attempted
    if rest is None:
        return outcome
    return once_where(~outcome[1], outcome, lambda last: rest(last[0]), REST, line.while_loop)


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
