"""What every solver has: tolerances, bounds, and the two choices that tell methods apart."""

import abc
import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from .._linear import LinearMethod
from .._structure import AbstractStructure


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a Python int or None; got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")


def check_tolerance(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a Python float or None; got {value!r}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be finite and not negative; got {value}.")


def check_linear_method(value: Any) -> None:
    if value not in (None, "sequential", "associative", "chunked"):
        raise ValueError(
            '`linear_method` must be "sequential", "associative", "chunked" or None; '
            f"got {value!r}."
        )


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


class AbstractSolver(abc.ABC):  # noqa: B024 (solvers share no method, only this type)
    """A method for solving a recurrence: an immutable record of hyperparameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractIterativeSolver(AbstractSolver):
    """Multiple shooting: sweep all chunks from guessed starts, correct the starts, repeat.

    Subclasses choose the *linearization*, that is, which approximation of the chunks' Jacobians the
    correction uses.

    **Arguments:**

    - `rtol`, `atol`: the iteration stops when the estimated error of every chunk's start is below
        `atol + rtol * scale`, with `scale` the largest magnitude so far in the sequence of the
        elements of a leaf that may influence each other. The returned states are then judged
        element by element, each by its own magnitude at its own time, and by what a relative
        disturbance of the states before it by `rtol` makes of it: an element is not excused by a
        larger one beside it, nor by what it was long ago. `rtol=None` is `eps ** 0.8` of the
        state's dtype (2.9e-6 in float32, 3e-13 in float64). Of a state of several dtypes, `rtol` is
        that of the widest, and the others are as many units in the last place less exact.
    - `max_iters`: the most iterations to make before the sequential finish. A check of the returned
        states that sends the iteration on counts as one.
    - `chunk_size`: how many steps a chunk has. `None` picks one from the length of the sequence and
        the structure.
    - `fallback`: whether to finish sequentially from the first chunk that did not converge. With
        `False` the result says `not_converged` instead.
    - `linear_method`: how the linear recurrence over the chunks is solved: `"sequential"`,
        `"associative"`, `"chunked"`, or `None` to pick by platform.

    Raises `TypeError` or `ValueError`, naming the argument, for values out of range.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iters: int = 100
    chunk_size: int | None = None
    fallback: bool = True
    linear_method: LinearMethod | None = None

    def __post_init__(self):
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)
        check_tolerance("atol", self.atol)
        check_positive_int("max_iters", self.max_iters)
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        if not isinstance(self.fallback, bool):
            raise TypeError(f"`fallback` must be True or False; got {self.fallback!r}.")
        check_linear_method(self.linear_method)

    @abc.abstractmethod
    def linearization(self, structure: AbstractStructure, size: int) -> Linearization:
        """What to use of the Jacobians of `size` state elements that have `structure`."""

    @abc.abstractmethod
    def default_chunk_size(self, structure: AbstractStructure, length: int, size: int) -> int:
        """The chunk size that `chunk_size=None` stands for, given the length of the sequence and
        the number of state elements."""

    def refine(
        self, chunks: Any, starts: Float[Array, "starts size"]
    ) -> tuple[Float[Array, "starts size"], int]:
        """Improves the guessed starts before the iteration, at the cost of a number of steps, which
        is returned with them. By default, it does nothing."""
        return starts, 0
