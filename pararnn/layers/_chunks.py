"""Many chunks of steps at once, by what each makes of the state.

A chunk's outputs need the state before it. Where the maps that chunks make of states compose, all
chunks are made into such maps side by side, one associative scan tells the states between them, and
all outputs follow side by side: a few launches, where one chunk after another takes them for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._misc import num_steps
from ..cells import AbstractCell

# A segment of so many chunks keeps a device busy, and what is made on the way is of one segment.
_CHUNKS_AT_ONCE = 64


def steps_at_once(length: int, chunk_size: int) -> int:
    """How many steps a segment has: whole chunks, in segments of about the same size."""
    chunks = -(-length // chunk_size)
    segments = -(-chunks // _CHUNKS_AT_ONCE)
    return -(-chunks // segments) * chunk_size


def apply_chunks(
    cell: AbstractCell,
    state: PyTree[Array],
    us: PyTree[Array],
    reset: Bool[Array, " L"] | None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """The state after some steps and their outputs, as of the cell's `apply_chunk`."""
    algebra, size, length = cell.chunk_algebra, cell.chunk_size, num_steps(us)
    assert algebra is not None and size is not None
    count, left = divmod(length, size)
    outputs = []
    if count > 0:
        rows = jtu.tree_map(
            lambda x: x[: count * size].reshape(-1, size, *x.shape[1:]), (us, reset)
        )
        state, ys = _side_by_side(cell, algebra, state, *rows)
        outputs.append(jtu.tree_map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    if left > 0:
        rest = jtu.tree_map(lambda x: x[count * size :], (us, reset))
        state, ys = cell.apply_chunk(state, *rest)
        outputs.append(ys)
    return state, jtu.tree_map(lambda *ys: jnp.concatenate(ys), *outputs)


def _side_by_side(cell, algebra, start, us, reset) -> tuple[PyTree[Array], PyTree[Array]]:
    def element(us: Any, reset: Any):
        return cell.chunk_factor(us, reset), cell.apply_chunk(cell.init_state(), us, reset)[0]

    compose = jax.vmap(algebra.compose)
    elements = jax.vmap(element)(us, reset)
    running = jax.lax.associative_scan(lambda earlier, later: compose(later, earlier), elements)
    after = jax.vmap(lambda element: algebra.apply(element, start))(running)
    before = jtu.tree_map(
        lambda h, hs: jnp.concatenate([jnp.expand_dims(h, 0), hs[:-1]]), start, after
    )
    _, ys = jax.vmap(cell.apply_chunk)(before, us, reset)
    return jtu.tree_map(lambda hs: hs[-1], after), ys
