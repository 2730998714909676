import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._base import AbstractSweep, Rows
from ._scanned import Scanned, from_chunks

# A kernel of more steps spills registers.
MOST_UNROLLED = 32


@dataclasses.dataclass(frozen=True)
class Unrolled(AbstractSweep):
    """All steps unrolled. On an accelerator, XLA fuses elementwise steps into one kernel with the
    carry in registers. Compile time grows with the number of steps of a chunk, of which there
    should be at most 32."""

    plain: ClassVar[bool] = True

    def small(self):
        return Scanned(in_place=True)

    def run(self, step, starts, inputs, rows, *, keep):
        batched, carry, states = jax.vmap(step), starts, []
        for i in range(rows.num_steps):
            carry = batched(carry, _at(inputs, rows, i))
            states.append(carry)
        if not keep:
            return carry, None
        return carry, from_chunks(jtu.tree_map(lambda *k: jnp.stack(k, 1), *states), rows)


def _at(inputs: PyTree[Array], rows: Rows, step: int) -> PyTree[Array]:
    """The inputs of all chunks at one step."""
    if not rows.covers or rows.length != rows.num_chunks * rows.num_steps:
        index = rows.at(step)
        return jtu.tree_map(lambda x: jnp.take(x, index, axis=0, mode="clip"), inputs)

    # Slices, unlike `jnp.take`, are read in place.
    def one(x):
        chunked = x.reshape(rows.num_chunks, rows.num_steps, *x.shape[1:])
        if rows.reverse:
            return jnp.flip(chunked[:, rows.num_steps - 1 - step], 0)
        return chunked[:, step]

    return jtu.tree_map(one, inputs)
