"""The chunkwise form of a cell: one chunk after another, or many in parallel by a scan over the
chunks' state maps.

A chunk's outputs need the state before it. Where the maps from state to state compose, those of all
chunks are computed in parallel, an associative scan gives the states between chunks, and all
outputs follow in parallel: a few launches, where one chunk after another takes a few for each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._misc import num_steps, previous_states
from .._norms import all_finite
from .._platform import chosen_platform
from .._recurrence import precise
from .._solution import RESULTS
from ..cells import AbstractChunkedCell
from ._segmented import ChunkFn

# Enough chunks to occupy a device; their maps and states are stored for one segment at a time.
_PARALLEL_CHUNKS = 64


def chunk_levels(cell: AbstractChunkedCell, length: int) -> list[tuple[int, ChunkFn]]:
    """The levels of `scan_segments` for a cell with a chunkwise form: many chunks in parallel, if
    that is possible and gains (not on a CPU), then single chunks."""
    size = cell.chunk_size
    levels = [(size, _with_result(cell.apply_chunk))]
    if length > size and cell.chunk_algebra is not None and chosen_platform(None) != "cpu":
        parallel = _with_result(functools.partial(apply_chunks_parallel, cell))
        levels.insert(0, (parallel_segment_size(length, size), parallel))
    return levels


def _with_result(apply: Callable[..., tuple[PyTree[Array], PyTree[Array]]]) -> ChunkFn:
    def checked(state, us, reset):
        after, ys = precise(apply)(state, us, reset)
        finite = all_finite((after, ys))
        return after, ys, RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite)

    return checked


def parallel_segment_size(length: int, chunk_size: int) -> int:
    """A number of steps: whole chunks, such that all segments have about the same size."""
    chunks = -(-length // chunk_size)
    segments = -(-chunks // _PARALLEL_CHUNKS)
    return -(-chunks // segments) * chunk_size


def apply_chunks_parallel(
    cell: AbstractChunkedCell,
    state: PyTree[Array],
    us: PyTree[Array],
    reset: Bool[Array, " L"] | None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """The state after some steps and their outputs, as of the cell's `apply_chunk`, for any number
    of steps."""
    size, length = cell.chunk_size, num_steps(us)
    whole = length - length % size
    outputs = []
    if whole > 0:
        chunks = jtu.tree_map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), (us, reset))
        state, ys = _apply_full_chunks(cell, state, *chunks)
        outputs.append(jtu.tree_map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    if whole < length:
        state, ys = cell.apply_chunk(state, *jtu.tree_map(lambda x: x[whole:], (us, reset)))
        outputs.append(ys)
    return state, jtu.tree_map(lambda *ys: jnp.concatenate(ys), *outputs)


def _apply_full_chunks(cell, start, us, reset) -> tuple[PyTree[Array], PyTree[Array]]:
    algebra = cell.chunk_algebra
    assert algebra is not None

    def element(us: Any, reset: Any):
        return cell.chunk_factor(us, reset), cell.apply_chunk(cell.init_state(), us, reset)[0]

    compose = jax.vmap(algebra.compose)
    elements = jax.vmap(element)(us, reset)
    running = jax.lax.associative_scan(lambda earlier, later: compose(later, earlier), elements)
    after = jax.vmap(lambda element: algebra.apply(element, start))(running)
    _, ys = jax.vmap(cell.apply_chunk)(previous_states(start, after), us, reset)
    return jtu.tree_map(lambda hs: hs[-1], after), ys
