import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._misc import num_steps
from ._base import AbstractScan


@dataclasses.dataclass(frozen=True)
class Sequential(AbstractScan):
    """`jax.lax.scan`, one element after another: the fastest on a CPU."""

    accurate_to: ClassVar[float] = math.inf

    def prefixes(self, combine, elements, *, reverse=False):
        if num_steps(elements) < 2:
            return elements

        def body(carry, element):
            carry = combine(carry, element)
            return carry, carry

        end = -1 if reverse else 0
        rest = slice(None, -1) if reverse else slice(1, None)
        first = jtu.tree_map(lambda x: x[end], elements)
        others = jtu.tree_map(lambda x: x[rest], elements)
        _, out = jax.lax.scan(body, first, others, reverse=reverse)

        def join(start, x):
            start = jnp.expand_dims(start, 0)
            return jnp.concatenate([x, start] if reverse else [start, x])

        return jtu.tree_map(join, first, out)

    def total(self, combine, elements):
        first = jtu.tree_map(lambda x: x[0], elements)
        others = jtu.tree_map(lambda x: x[1:], elements)
        if num_steps(others) == 0:
            return first
        return jax.lax.scan(lambda t, e: (combine(t, e), None), first, others)[0]

    def affine(self, structure, matrices, offsets, *, reverse=False):
        if offsets.shape[0] == 0:
            return offsets

        def step(h, element):  # without products of matrices
            matrix, offset = element
            h = structure.apply(matrix, h) + offset
            return h, h

        start = jnp.zeros_like(offsets[0])
        return jax.lax.scan(step, start, (matrices, offsets), reverse=reverse)[1]
