"""What is asked of a sweep.

All steps that a parallel solve makes are made by one function: those of the iteration, with or
without tangents, those of the states that are returned, and those of the derivative's recurrence,
whose linear step is an ordinary step. So another way to make them is one class and nothing else.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

# From a carry and a slice of the inputs to the next carry, for one chunk.
Step = Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]


class Rows(NamedTuple):
    """Which inputs the chunks consume: step `i` of chunk `c` is at time `first + c * stride + i`,
    and at the last time if that is beyond it.

    - `length`: how many inputs there are.
    - `num_chunks`, `num_steps`: how many chunks, and how many steps each of them makes.
    - `stride`: from a chunk to the next; with 0, all consume the same.
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
        """Whether the steps of all chunks are those of the whole sequence."""
        adjoin = self.first == 0 and self.stride == self.num_steps
        return adjoin and self.num_chunks * self.num_steps >= self.length

    def at(self, step: Int[Array, "..."] | int) -> Int[Array, "... chunks"]:
        """The rows that all chunks consume at a step of theirs, or at several."""
        begin = self.first + self.stride * jnp.arange(self.num_chunks)
        times = jnp.add.outer(jnp.asarray(step), begin)
        times = jnp.clip(times, 0, self.length - 1)
        return self.length - 1 - times if self.reverse else times


class AbstractSweep(abc.ABC):
    """A way to run chunks side by side, each from a start of its own.

    Instances are immutable and hashable, such as frozen dataclasses; a solver takes one as its
    `sweep_method`.
    """

    # Whether what is carried is better one vector than the leaves of a state: where taking it apart
    # costs nothing within a step, but a copy outside.
    takes_vectors: ClassVar[bool] = False
    # Whether it calls the step as it is, so that its states need no check against the step.
    plain: ClassVar[bool] = False

    def prepare(self, xs: PyTree[Array], rows: Rows) -> PyTree[Array]:
        """What `run` reads of the inputs, for any number of runs. By default `xs` as they are."""
        return xs

    def small(self) -> "AbstractSweep":
        """The sweep for what is seldom run: whose program is small. By default itself."""
        return self

    @abc.abstractmethod
    def run(
        self, step: Step, starts: PyTree[Array], inputs: PyTree[Array], rows: Rows, *, keep: bool
    ) -> tuple[PyTree[Array], PyTree[Array] | None]:
        """Makes the steps of all chunks.

        **Arguments:**

        - `step`: `step(carry, x) -> carry` of a single chunk. It may close over arrays.
        - `starts`: what the chunks start from, a pytree of arrays of shape `(num_chunks, ...)`.
        - `inputs`: what `prepare` made of the inputs, a pytree of arrays of shape `(length, ...)`.
        - `rows`: which of them the chunks consume.
        - `keep`: whether to return what is carried after every step; only if `rows.covers`.

        **Returns:**

        `(ends, states)`: where the chunks end, shaped like `starts`; and what was carried after
        every step, shape `(length, ...)` with rows like those of the inputs, or `None`.
        """
