"""The interface of sweeps.

One function runs all steps of a parallel solve: those of the iteration, with or without tangents,
those of the returned states, and those of the adjoint's recurrence, whose linear step is an
ordinary step. So a new way to run them is one class.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

# From a carry and a slice of the inputs to the next carry, for one chunk.
Step = Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]


class Rows(NamedTuple):
    """The inputs that chunks consume: step `i` of chunk `c` is at time `first + c * stride + i`,
    clipped to `0 … length - 1`.

    **Fields:**

    - `length`: the number of inputs.
    - `num_chunks`, `num_steps`: the number of chunks, and of steps of each chunk.
    - `stride`: the distance of a chunk to the next; with 0, all chunks consume the same inputs.
    - `first`: the time of the first step of chunk 0.
    - `reverse`: whether time runs backwards, so that row `length - 1` of the inputs is at time 0.
    """

    length: int
    num_chunks: int
    num_steps: int
    stride: int
    first: int = 0
    reverse: bool = False

    @property
    def covers(self) -> bool:
        """Whether adjacent chunks cover the whole sequence."""
        adjoin = self.first == 0 and self.stride == self.num_steps
        return adjoin and self.num_chunks * self.num_steps >= self.length

    def at(self, step: Int[Array, "..."] | int) -> Int[Array, "... chunks"]:
        """The rows that all chunks consume at one of their steps, or at several."""
        begin = self.first + self.stride * jnp.arange(self.num_chunks)
        times = jnp.add.outer(jnp.asarray(step), begin)
        times = jnp.clip(times, 0, self.length - 1)
        return self.length - 1 - times if self.reverse else times


class AbstractSweep(abc.ABC):
    """Runs the steps of all chunks in parallel, each chunk from its own start.

    Instances are immutable and hashable, such as frozen dataclasses; a solver takes one as its
    `sweep_method`.
    """

    # Whether a solver should pass the carry as one vector instead of the leaves of a state: where
    # splitting it costs nothing within a step, but a copy outside.
    takes_vectors: ClassVar[bool] = False
    # Whether it calls the step itself, so that its states need no comparison with the step's.
    plain: ClassVar[bool] = False

    def prepare(self, xs: PyTree[Array], rows: Rows) -> PyTree[Array]:
        """The inputs as `run` reads them, for any number of runs. By default `xs`."""
        return xs

    def small(self) -> "AbstractSweep":
        """A sweep with a small program, for code that seldom runs. By default `self`."""
        return self

    @abc.abstractmethod
    def run(
        self, step: Step, starts: PyTree[Array], inputs: PyTree[Array], rows: Rows, *, keep: bool
    ) -> tuple[PyTree[Array], PyTree[Array] | None]:
        """Runs the steps of all chunks.

        **Arguments:**

        - `step`: `step(carry, x) -> carry` of a single chunk. It may close over arrays.
        - `starts`: the initial carries, a pytree of arrays of shape `(num_chunks, ...)`.
        - `inputs`: the result of `prepare`.
        - `rows`: the inputs that the chunks consume.
        - `keep`: whether to return the carry after every step; requires `rows.covers`.

        **Returns:**

        `(ends, states)`: the final carries, shaped like `starts`; and the carries after every step,
        of shape `(length, ...)` with rows in the order of the inputs, or `None` without `keep`.
        """
