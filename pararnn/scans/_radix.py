import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import flip_time, num_steps
from .._validate import check_positive_int
from ..structures import AbstractStructure
from ._base import AbstractScan, compose_affine

# Matrices of blocks up to this size are stored as one array per entry: arithmetic is elementwise.
_MOST_ENTRIES = 3
# Elementwise steps fuse into one kernel, whatever their number. Products of larger matrices do not
# fuse: fewer of them in a row are fewer kernels.
_ELEMENTWISE_RADIX, _RADIX = 16, 3


@dataclasses.dataclass(frozen=True)
class Radix(AbstractScan):
    """A recursion: reduce blocks of a few elements to one summary each, scan the summaries by the
    same method, and scan the blocks from there.

    The steps within a block are unrolled, so that elementwise ones fuse into one kernel: an
    accelerator runs about two kernels per level, and reads the elements twice.

    **Arguments:**

    - `radix`: the number of elements in a block. `None` is 16 for vectors and for matrices of
        blocks up to 3 x 3, and 3 for larger matrices.
    """

    accurate_to: ClassVar[float] = 16_384

    radix: int | None = None

    def __post_init__(self):
        if self.radix is not None:
            check_positive_int("radix", self.radix)
            if self.radix < 2:
                raise ValueError(f"`radix` must be at least 2; got {self.radix}.")

    def prefixes(self, combine, elements, *, reverse=False):
        if num_steps(elements) < 2:
            return elements
        elements = flip_time(elements) if reverse else elements
        vectors = all(x.ndim <= 2 for x in jtu.tree_leaves(elements))
        radix = self.radix or (_ELEMENTWISE_RADIX if vectors else _RADIX)
        prefixes = _prefixes(jax.vmap(combine), elements, radix)
        return flip_time(prefixes) if reverse else prefixes

    def affine(self, structure, matrices, offsets, *, reverse=False):
        if offsets.shape[0] < 2:
            return offsets
        if reverse:
            matrices, offsets = flip_time((matrices, offsets))
        states = self._affine(structure, matrices, offsets)
        return flip_time(states) if reverse else states

    def _affine(self, structure: AbstractStructure, matrices: Array, offsets: Array) -> Array:
        blocks = structure.as_blocks(matrices, offsets)
        if blocks is None or blocks[1].shape[-1] > _MOST_ENTRIES:
            compose = functools.partial(compose_affine, structure)
            return _solve(compose, structure.apply, (matrices, offsets), self.radix or _RADIX)
        matrices, offsets = blocks
        index = range(offsets.shape[-1])
        entries = [[matrices[..., i, j] for j in index] for i in index]
        vectors = [offsets[..., i] for i in index]
        radix = self.radix or _ELEMENTWISE_RADIX
        solution = _solve(_compose_entries, _apply_entries, (entries, vectors), radix)
        return structure.from_blocks(jnp.stack(solution, axis=-1))


_Combine = Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]]


def _prefixes(combine: _Combine, elements: PyTree[Array], radix: int) -> PyTree[Array]:
    """The prefixes of `elements`; `combine` takes any number of pairs at once."""
    length = num_steps(elements)
    blocks = _blocks(elements, radix, "edge")
    if num_steps(blocks) == 1:
        return _joined(_chain(combine, _at(blocks, 0), blocks), length)
    summaries = _total(combine, blocks)
    before = jtu.tree_map(lambda x: x[:-1], _prefixes(combine, summaries, radix))
    first = _at(blocks, 0)
    later = combine(before, jtu.tree_map(lambda x: x[1:], first))
    first = jtu.tree_map(lambda x, y: jnp.concatenate([x[:1], y]), first, later)
    return _joined(_chain(combine, first, blocks), length)


def _solve(compose: _Combine, apply: Callable[..., Any], elements: Any, radix: int) -> Any:
    """All $h_t = A_t h_{t-1} + b_t$ with $h_{-1} = 0$. The second pass over a block starts from the
    state before it, so that it needs no products of matrices."""
    length = num_steps(elements)
    # Zeros, unlike repeated elements, fuse into the operations that read them.
    blocks = _blocks(elements, radix, "constant")

    def step(h, element):
        matrix, offset = element
        return jtu.tree_map(jnp.add, apply(matrix, h), offset)

    if num_steps(blocks) == 1:
        return _joined(_chain(step, _at(blocks, 0)[1], blocks), length)
    ends = _solve(compose, apply, _total(compose, blocks), radix)
    starts = jtu.tree_map(lambda e: jnp.concatenate([jnp.zeros_like(e[:1]), e[:-1]]), ends)
    return _joined(_chain(step, step(starts, _at(blocks, 0)), blocks), length)


def _blocks(
    elements: PyTree[Array], radix: int, fill: Literal["edge", "constant"]
) -> PyTree[Array]:
    """`(length, ...) -> (blocks, radix, ...)`. The last block is padded with the last element, or
    with zeros."""
    length = num_steps(elements)
    radix = min(radix, length)
    count = math.ceil(length / radix)
    surplus = count * radix - length

    def one(x):
        x = jnp.pad(x, [(0, surplus)] + [(0, 0)] * (x.ndim - 1), mode=fill)
        return x.reshape(count, radix, *x.shape[1:])

    return jtu.tree_map(one, elements)


def _at(blocks: PyTree[Array], index: int) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[:, index], blocks)


def _total(combine: _Combine, blocks: PyTree[Array]) -> PyTree[Array]:
    others = range(1, jtu.tree_leaves(blocks)[0].shape[1])
    return functools.reduce(lambda t, i: combine(t, _at(blocks, i)), others, _at(blocks, 0))


def _chain(step: _Combine, first: PyTree[Array], blocks: PyTree[Array]) -> list[PyTree[Array]]:
    """The states within all blocks: `first`, then `step` applied with each further element."""
    chain = [first]
    for i in range(1, jtu.tree_leaves(blocks)[0].shape[1]):
        chain.append(step(chain[-1], _at(blocks, i)))
    return chain


def _joined(chain: list[PyTree[Array]], length: int) -> PyTree[Array]:
    def one(*places):
        x = jnp.stack(places, axis=1)
        return x.reshape(-1, *x.shape[2:])[:length]

    return jtu.tree_map(one, *chain)


def _apply_entries(matrix: list[list[Array]], vector: list[Array]) -> list[Array]:
    return [functools.reduce(jnp.add, map(jnp.multiply, row, vector)) for row in matrix]


def _compose_entries(earlier: Any, later: Any) -> Any:
    (matrix1, offset1), (matrix2, offset2) = earlier, later
    columns = [list(column) for column in zip(*matrix1, strict=True)]
    product = [_apply_entries(columns, row) for row in matrix2]
    return product, list(map(jnp.add, _apply_entries(matrix2, offset1), offset2))
