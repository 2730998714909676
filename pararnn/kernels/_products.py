"""Products: with weights by blocks of the weight, all others as sums of elementwise products."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..jaxprs._moves import positions
from ._elementwise import is_narrow
from ._layout import Writer, cheapest_axis, laid, masked, rearranged, stretched, tilewise
from ._program import Unsupported, steps_of
from ._tiles import Span, Stored, Tile, Tiled, Value, empty_tiles, lanes_of, vector_shape


class _Side(NamedTuple):
    """An operand of a product, with its contracted and batch axes."""

    value: Value
    contract: Sequence[int]
    batch: Sequence[int]

    @property
    def free(self) -> list[int]:
        taken = {*self.contract, *self.batch}
        return [i for i in range(len(self.value.shape)) if i not in taken]

    @property
    def is_weight(self) -> bool:
        """Whether it can be loaded in blocks: a constant in memory, evenly spaced."""
        if not isinstance(self.value, Stored) or self.value.source[0] != "constant":
            return False
        return steps_of(self.value.positions) is not None

    def sizes(self, axes: Sequence[int]) -> list[int]:
        return [self.value.shape[i] for i in axes]


def dot_general(
    writer: Writer, eqn: Any, ins: Sequence[Value], reduced: Callable[..., Tiled]
) -> Tiled:
    """The product of two values; `reduced` reduces a value over axes."""
    contract, batch = eqn.params["dimension_numbers"]
    left, right = (_Side(ins[i], contract[i], batch[i]) for i in range(2))
    dtype = eqn.outvars[0].aval.dtype
    if dtype == np.bool_:
        raise Unsupported("multiplies booleans")
    sides = ((left, right, False), (right, left, True))
    for vector, weight, swapped in sides if jnp.issubdtype(dtype, jnp.floating) else ():
        if weight.is_weight and not vector.is_weight and weight.free and vector.contract:
            value = _in_registers(writer, vector)
            if value.axis in vector.contract:
                vector = vector._replace(value=value)
                return _by_blocks(writer, vector, weight, swapped, dtype)
    return _by_elements(writer, left, right, dtype, reduced)


def _in_registers(writer: Writer, side: _Side) -> Tiled:
    if isinstance(side.value, Tiled):
        return side.value
    axis = max(side.contract, key=lambda i: (side.value.shape[i], i))
    return laid(writer, side.value, side.value.shape, axis)


# --- by blocks of a weight ----------------------------------------------------------------------


def _by_blocks(writer, vector, weight, swapped, dtype) -> Tiled:
    """Contracts the lane axis of `vector`; the lane axis of the result is one of `weight`."""
    value, cuts = vector.value, writer.cuts
    pair = list(vector.contract).index(value.axis)
    rest = [k for k in range(len(vector.contract)) if k != pair]
    along = max(weight.free, key=lambda i: (weight.value.shape[i], i))
    outer = [i for i in weight.free if i != along]
    order = [*weight.batch, *outer, *(weight.contract[k] for k in rest)]
    positions = weight.value.positions.transpose(*order, weight.contract[pair], along)
    blocks = _Blocks(writer, weight.value, positions, dtype)
    shape, axis = _result(vector, weight, along, swapped)
    tiles = empty_tiles(shape, axis, cuts)
    segments = cuts.segments(shape[axis])
    for lead in np.ndindex(tiles.shape[:-1]):
        b, f, g = _split_index(lead, vector, weight, outer, swapped)
        parts = []
        for c in np.ndindex(*vector.sizes([vector.contract[k] for k in rest])):
            at = dict(zip([*vector.batch, *vector.free], [*b, *f], strict=True))
            at |= {vector.contract[k]: i for k, i in zip(rest, c, strict=True)}
            place = tuple(at[i] for i in range(len(value.shape)) if i != value.axis)
            parts.append((value.tiles[place], (*b, *g, *c)))
        for k, segment in enumerate(segments):
            array = blocks.total(parts, segment, vector_shape(value.shape)[value.axis])
            tiles[(*lead, k)] = Tile(array, segment[1] - segment[0])
    return Tiled(shape, dtype, axis, tiles)


def _result(vector, weight, along, swapped):
    """The shape of the result, and the axis in it that is the axis `along` of the weight."""
    sides = (weight, vector) if swapped else (vector, weight)
    shape, axis = vector.sizes(vector.batch), 0
    for side in sides:
        if side is weight:
            axis = len(shape) + side.free.index(along)
        shape += side.sizes(side.free)
    return tuple(shape), axis


def _split_index(lead, vector, weight, outer, swapped):
    """Splits the index of a tile of the result into those of the batch axes and of the free axes of
    the vector and of the weight."""
    num_batch = len(vector.batch)
    b, rest = lead[:num_batch], lead[num_batch:]
    split = len(outer) if swapped else len(vector.free)
    first, second = rest[:split], rest[split:]
    return (b, second, first) if swapped else (b, first, second)


class _Blocks:
    """The blocks of a weight; the last two axes of `positions` are a contracted and a free one."""

    def __init__(self, writer: Writer, weight: Stored, positions: np.ndarray, dtype: Any):
        self.writer, self.weight, self.positions, self.dtype = writer, weight, positions, dtype

    def total(self, parts, segment, size):
        """The sum of the products of all parts with the columns of a segment of the result."""
        sums = []
        for tiles, place in parts:
            for tile, rows in zip(tiles, self.writer.cuts.segments(size), strict=True):
                block = self.positions[place][slice(*rows), slice(*segment)]
                sums.append(self._product(tile, block))
        total = sums[0]
        for array in sums[1:]:
            shape = tuple(map(max, total.shape, array.shape))
            total = stretched(total, shape) + stretched(array, shape)
        return total.astype(self.dtype)

    def _product(self, tile: Tile, positions: np.ndarray):
        steps = steps_of(positions)
        assert steps is not None  # as those of the whole weight
        span = Span(self.weight.source, int(positions[0, 0]), steps, positions.shape)
        vector = stretched(tile.array, (tile.array.shape[0], lanes_of(tile.width)))
        return self.writer.product(masked(vector, tile.width), span, self.weight.dtype)


# --- by elements --------------------------------------------------------------------------------


def _by_elements(writer, left, right, dtype, reduced) -> Tiled:
    """Broadcasts both operands to all axes, the contracted ones first, multiplies and sums."""
    shape = [*left.sizes(left.contract), *left.sizes(left.batch)]
    shape += [*left.sizes(left.free), *right.sizes(right.free)]
    num_summed, num_common = len(left.contract), len(left.contract) + len(left.batch)
    moves = []
    for side, start in ((left, num_common), (right, num_common + len(left.free))):
        index = positions(side.value.shape).transpose(*side.contract, *side.batch, *side.free)
        stop = start + len(side.free)
        around = [*range(num_common, start), *range(stop, len(shape))]
        index = np.broadcast_to(np.expand_dims(index, around), shape)
        moves.append(([side.value], index))
    axis = cheapest_axis(writer, [m for m in moves if isinstance(m[0][0], Tiled)] or moves)
    factors = [rearranged(writer, values, index, axis) for values, index in moves]
    wide = np.dtype(np.float32) if is_narrow(dtype) else dtype
    product = tilewise(writer, lambda x, y: lax.mul(x.astype(wide), y.astype(wide)), factors, shape)
    total = reduced(writer, product, set(range(num_summed)), "reduce_sum")
    return tilewise(writer, lambda x: x.astype(jnp.dtype(dtype)), [total], total.shape)
