import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._misc import flip_time, num_steps
from ._associative import Associative
from ._base import AbstractScan, compose_affine
from ._sequential import Sequential, affine_from


@dataclasses.dataclass(frozen=True)
class Chunked(AbstractScan):
    """Blocks of about the square root of the length side by side, then their summaries, then the
    blocks again: compiles quickly at any length."""

    accurate_to: ClassVar[float] = 16_384

    def prefixes(self, combine, elements, *, reverse=False):
        if num_steps(elements) < 2:
            return elements
        blocks, restore = _cut(elements, reverse)
        local = Sequential().prefixes(jax.vmap(combine), blocks)
        totals = Associative().prefixes(combine, jtu.tree_map(lambda x: x[-1], local))
        # What is before a block is combined with all of it; before the first, there is nothing.
        before = jtu.tree_map(lambda x: x[:-1], totals)
        first, later = (jtu.tree_map(lambda x, s=s: x[:, s], local) for s in (_FIRST, _LATER))
        over_blocks = jax.vmap(jax.vmap(combine), in_axes=(None, 0))
        later = over_blocks(before, later)
        return restore(jtu.tree_map(lambda a, b: jnp.concatenate([a, b], 1), first, later))

    def affine(self, structure, matrices, offsets, *, reverse=False):
        if offsets.shape[0] < 2:
            return offsets
        (matrices, offsets), restore = _cut((matrices, offsets), reverse)
        elements = matrices, offsets

        def compose(summary, element):
            return compose_affine(structure, summary, element), None

        first = jtu.tree_map(lambda x: x[0], elements)
        rest = jtu.tree_map(lambda x: x[1:], elements)
        summary, _ = jax.lax.scan(compose, first, rest)
        ends = Associative().affine(structure, *summary)
        starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        return restore(affine_from(starts, structure, *elements))


_FIRST, _LATER = slice(None, 1), slice(1, None)


def _cut(elements, reverse):
    """Arrays of shape `(block_size, num_blocks, ...)`, and the way back. Surplus elements, which
    come last, are zero."""
    length = num_steps(elements)
    block_size = math.isqrt(length - 1) + 1
    num_blocks = -(-length // block_size)
    padding = num_blocks * block_size - length

    def one(x):
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(num_blocks, block_size, *x.shape[1:]), 0, 1)

    def restore(tree):
        def one(x):
            x = jnp.swapaxes(x, 0, 1)
            return x.reshape(num_blocks * block_size, *x.shape[2:])[:length]

        tree = jtu.tree_map(one, tree)
        return flip_time(tree) if reverse else tree

    return jtu.tree_map(one, flip_time(elements) if reverse else elements), restore
