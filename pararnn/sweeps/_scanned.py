import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import flip_time
from ._base import AbstractSweep, Rows


@dataclasses.dataclass(frozen=True)
class Scanned(AbstractSweep):
    """A `jax.lax.scan` over the steps of all chunks: compiles quickly, and is the fastest on a CPU.
    On an accelerator the host launches every iteration.

    **Arguments:**

    - `in_place`: whether each step gathers its inputs. Otherwise `prepare` copies all inputs in the
        order of the steps, once for any number of sweeps.
    """

    plain: ClassVar[bool] = True

    in_place: bool = False

    def prepare(self, xs, rows):
        if _is_single(rows):
            return xs if rows.covers else jtu.tree_map(lambda x: x[_slice(rows)], xs)
        if self.in_place:
            return xs
        if rows.covers:
            return jtu.tree_map(lambda x: _to_chunks(x, rows), xs)
        index = rows.at(jnp.arange(rows.num_steps))
        index = index[:, 0] if rows.stride == 0 else index
        return jtu.tree_map(lambda x: jnp.take(x, index, axis=0, mode="clip"), xs)

    def run(self, step, starts, inputs, rows, *, keep):
        if _is_single(rows):
            return _run_single(step, starts, inputs, rows, keep)
        batched = jax.vmap(step, in_axes=(0, None if rows.stride == 0 else 0))

        def body(carry, x):
            if self.in_place:
                index = rows.at(x)
                index = index[0] if rows.stride == 0 else index
                x = jtu.tree_map(lambda x: jnp.take(x, index, axis=0, mode="clip"), inputs)
            carry = batched(carry, x)
            return carry, carry if keep else None

        inputs_in_order = jnp.arange(rows.num_steps) if self.in_place else inputs
        if rows.num_steps == 1:  # needs no loop
            carry, states = body(starts, jtu.tree_map(lambda x: x[0], inputs_in_order))
            states = jtu.tree_map(lambda k: jnp.expand_dims(k, 0), states)
        else:
            carry, states = jax.lax.scan(body, starts, inputs_in_order)
        states = from_chunks(jtu.tree_map(lambda k: jnp.swapaxes(k, 0, 1), states), rows)
        return carry, states


def _is_single(rows: Rows) -> bool:
    return rows.num_chunks == 1 and rows.first + rows.num_steps <= rows.length


def _slice(rows: Rows) -> slice:
    first = rows.length - rows.first - rows.num_steps if rows.reverse else rows.first
    return slice(first, first + rows.num_steps)


def _run_single(step, starts, inputs, rows, keep):
    """A single chunk, without an axis of chunks, which would copy all inputs."""

    def body(carry, x):
        carry = step(carry, x)
        return carry, carry if keep else None

    start = jtu.tree_map(lambda x: x[0], starts)
    end, states = jax.lax.scan(body, start, inputs, reverse=rows.reverse)
    return jtu.tree_map(lambda x: jnp.expand_dims(x, 0), end), states


def _to_chunks(x: Array, rows: Rows) -> Array:
    """`(length, ...) -> (num_steps, num_chunks, ...)`. The last chunk is padded with the last
    input, so that the surplus steps, whose states are dropped, stay finite."""
    x = jnp.flip(x, 0) if rows.reverse else x
    surplus = rows.num_steps * rows.num_chunks - rows.length
    if surplus:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (surplus, *x.shape[1:]))])
    return jnp.swapaxes(x.reshape(rows.num_chunks, rows.num_steps, *x.shape[1:]), 0, 1)


def from_chunks(states: PyTree[Array] | None, rows: Rows) -> PyTree[Array] | None:
    """`(num_chunks, num_steps, ...) -> (length, ...)`, each state in the row of its input."""

    def one(x):
        x = x.reshape(rows.num_chunks * rows.num_steps, *x.shape[2:])[: rows.length]
        return flip_time(x) if rows.reverse else x

    return jtu.tree_map(one, states)
