import dataclasses
from typing import ClassVar

import jax

from ..kernels import fused_sweep, unsupported
from ._base import AbstractSweep
from ._scanned import Scanned
from ._unrolled import MOST_UNROLLED, Unrolled


@dataclasses.dataclass(frozen=True)
class Fused(AbstractSweep):
    """All steps in one kernel of a CUDA device, which is generated from the step and has the carry
    in registers; see [`pararnn.kernels.fused_sweep`][].

    A step for which no kernel can be generated, and every step on other platforms, runs like
    `Unrolled()` or `Scanned()`; [`pararnn.kernels.unsupported`][] tells why.

    **Arguments:**

    - `interpret`: whether to interpret the kernel without a GPU, slowly, as tests do.
    """

    takes_vectors: ClassVar[bool] = True

    interpret: bool = False

    def run(self, step, starts, inputs, rows, *, keep):
        def fused(starts, inputs):
            return fused_sweep(
                step,
                starts,
                inputs,
                num_steps=rows.num_steps,
                stride=rows.stride,
                first=rows.first,
                keep=keep,
                reverse=rows.reverse,
                interpret=self.interpret,
            )

        def plain(starts, inputs):
            sweep = Unrolled() if rows.num_steps <= MOST_UNROLLED else Scanned()
            return sweep.run(step, starts, sweep.prepare(inputs, rows), rows, keep=keep)

        if unsupported(step, starts, inputs) is not None:
            return plain(starts, inputs)
        if self.interpret:
            return fused(starts, inputs)
        return jax.lax.platform_dependent(starts, inputs, cuda=fused, default=plain)
