import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from .._recurrence import Recurrence, scan_states
from .._solution import Stats
from ._base import AbstractSolver


@dataclasses.dataclass(frozen=True)
class Sequential(AbstractSolver):
    """One step after another with `jax.lax.scan`: the reference, and the fastest forward pass on a
    CPU or on an accelerator that a large batch keeps busy.

    The derivative is still solved as a linear recurrence of its own, in parallel if its solver is:
    *sequential forward, parallel backward*, the right mode for chaotic systems.
    """

    stepwise: ClassVar[bool] = True
    runs_backwards: ClassVar[bool] = True

    def solve(self, recurrence, guess, report=None):
        length = recurrence.length
        stats = Stats(
            iterations=jnp.asarray(0),
            correction=jnp.zeros((), jnp.float32),
            chunk_size=length,
            sequential_steps=jnp.asarray(length),
            fallback=jnp.asarray(False),
        )
        return self.solve_affine(recurrence), jnp.asarray(True), stats

    def solve_affine(self, recurrence: Recurrence):
        return scan_states(
            recurrence.step, recurrence.xs, recurrence.init, reverse=recurrence.reverse
        )
