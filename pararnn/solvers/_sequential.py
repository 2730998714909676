import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import jax.tree_util as jtu

from .._recurrence import Recurrence, scan_states
from .._solution import Stats
from ..scans import Sequential as Scan
from ..sweeps import AbstractSweep, Fused, Rows, Scanned
from ..sweeps._default import check_sweep, uses_kernel
from ._base import AbstractSolver, SolverOutput
from ._chunks import Chunks
from ._finish import finish_sequentially
from ._linearization import Linearization
from ._verdict import is_wrong


@dataclasses.dataclass(frozen=True)
class Sequential(AbstractSolver):
    """One step after another with `jax.lax.scan`: the reference, and the fastest forward pass on a
    CPU or on an accelerator that a large batch keeps busy.

    The derivative is still solved as a linear recurrence of its own, in parallel if its solver is:
    *sequential forward, parallel backward*, the right mode for chaotic systems.

    **Arguments:**

    - `sweep_method`: how the steps are made, as for [`pararnn.solvers.AbstractIterativeSolver`][];
        [`pararnn.sweeps.Fused`][] makes them in one kernel. `None` is `jax.lax.scan`. Some states
        of any other sweep are compared with the plain step; if one is wrong, `jax.lax.scan` makes
        all of them.
    """

    stepwise: ClassVar[bool] = True
    runs_backwards: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True

    sweep_method: AbstractSweep | None = None

    def __post_init__(self):
        check_sweep("sweep_method", self.sweep_method)

    def resolved(self, recurrence, platform=None):
        asked = self.sweep_method is not None
        if asked or not uses_kernel(recurrence.step, recurrence.init, recurrence.xs, platform):
            return self
        return Sequential(sweep_method=Fused())

    def solve(self, recurrence, guess, report=None):
        length = recurrence.length * recurrence.shards.count
        states, made_again = self.solve_affine(recurrence), jnp.asarray(0)
        sweep = self.sweep_method or Scanned()
        if not sweep.plain and not recurrence.shards.is_sharded:
            one = Chunks(recurrence, Linearization.zero(), length, Scan(), sweep, None, 0.0)
            wrong = jnp.expand_dims(is_wrong(one, one.first_start, states), 0)
            states, made_again = finish_sequentially(recurrence, states, wrong, length)
        stats = Stats(
            iterations=jnp.asarray(0),
            correction=jnp.zeros((), jnp.float32),
            chunk_size=length,
            sequential_steps=length + made_again,
            fallback=made_again > 0,
        )
        return SolverOutput(states, jnp.asarray(True), stats)

    def solve_affine(self, recurrence: Recurrence):
        step, xs, init, length = recurrence.step, recurrence.xs, recurrence.init, recurrence.length
        if recurrence.shards.is_sharded:  # one device after another
            nothing = jtu.tree_map(lambda h: jnp.zeros((length, *h.shape), h.dtype), init)
            nothing = recurrence.shards.place_like(nothing, (init, xs))
            return finish_sequentially(recurrence, nothing, jnp.ones(1, bool), length)[0]
        sweep = self.sweep_method
        if sweep is None:
            return scan_states(step, xs, init, reverse=recurrence.reverse)
        rows = Rows(length, 1, length, length, reverse=recurrence.reverse)
        starts = jtu.tree_map(lambda h: jnp.expand_dims(h, 0), init)
        return sweep.run(step, starts, sweep.prepare(xs, rows), rows, keep=True)[1]
