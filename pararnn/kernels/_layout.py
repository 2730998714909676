"""Moving elements between tiles: nothing of it is left when the kernel runs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..jaxprs._moves import positions
from ._program import Fixed, Unsupported
from ._tiles import (
    TOO_MANY,
    Cuts,
    Span,
    Stored,
    Tile,
    Tiled,
    Value,
    default_axis,
    empty_tiles,
    fits,
    object_array,
    vector_shape,
)


class Writer(NamedTuple):
    """What rules need to write a step down.

    **Arguments:**

    - `cuts`: where the lane axes are cut.
    - `load`: the array of a span, of shape (1 or rows, lanes).
    - `rows`: how many chunks are run at once.
    - `product`: the product of an array (1 or rows, k) with the matrix of a span of two axes.
    """

    cuts: Cuts
    load: Callable[[Span, Any], Any]
    rows: int
    product: Callable[[Any, Span, Any], Any]


def number(fixed: Fixed) -> Tiled:
    """A number that stands in the step."""
    value = fixed.value
    array = lax.full((1, 1), value[()], value.dtype)
    return filled((), value.dtype, Tile(array, 1), Cuts())


def filled(
    shape: Sequence[int], dtype: Any, tile: Tile, cuts: Cuts, axis: int | None = None
) -> Tiled:
    """A value whose elements are all the same."""
    axis = default_axis(shape) if axis is None else axis
    tiles = empty_tiles(shape, axis, cuts)
    for k, (low, high) in enumerate(cuts.segments(vector_shape(shape)[axis])):
        for lead in np.ndindex(tiles.shape[:-1]):
            tiles[(*lead, k)] = Tile(tile.array, high - low)
    return Tiled(tuple(shape), dtype, axis, tiles)


class _Element(NamedTuple):
    """For each element of several values, one after another: its tile (or `-1 - i`, for the value
    `i` in memory), and its lane there (or its position)."""

    tile: np.ndarray
    lane: np.ndarray


class _Sources(NamedTuple):
    values: Sequence[Value]
    elements: _Element
    tiles: Sequence[Tile]
    places: Sequence[tuple[int, int]]  # of each tile: the size of its axis, and where it starts


def _sources(writer: Writer, values: Sequence[Value]) -> _Sources:
    numbers, lanes, tiles, places = [], [], [], []
    for i, value in enumerate(values):
        if isinstance(value, Stored):
            numbers.append(np.full(value.positions.size, -1 - i))
            lanes.append(value.positions.reshape(-1))
            continue
        size = vector_shape(value.shape)[value.axis]
        segments = writer.cuts.segments(size)
        index = len(tiles) + np.arange(value.tiles.size).reshape(value.tiles.shape)
        which = np.repeat(np.arange(len(segments)), [b - a for a, b in segments])
        lane = np.concatenate([np.arange(b - a) for a, b in segments])
        per_element = np.moveaxis(index[..., which], -1, value.axis)
        shape = [size if k == value.axis else 1 for k in range(per_element.ndim)]
        lane = np.broadcast_to(lane.reshape(shape), per_element.shape)
        numbers.append(per_element.reshape(-1))
        lanes.append(lane.reshape(-1))
        tiles.extend(value.tiles.reshape(-1))
        places.extend((size, segments[k % len(segments)][0]) for k in range(index.size))
    return _Sources(values, _Element(np.concatenate(numbers), np.concatenate(lanes)), tiles, places)


def rearranged(
    writer: Writer, values: Sequence[Value], index: np.ndarray, axis: int | None = None
) -> Value:
    """Elements of values, which follow one another, at the positions `index`.

    **Arguments:**

    - `axis`: the lane axis of the result; by default one for which nothing need be cut.
    """
    first = values[0]
    if isinstance(first, Stored) and axis is None:
        same = [v for v in values if isinstance(v, Stored) and v.source == first.source]
        if len(same) == len(values):
            flat = np.concatenate([v.positions.reshape(-1) for v in same])
            return Stored(first.source, np.asarray(flat[index]), first.dtype)
    if axis is None:
        axis = cheapest_axis(writer, [(values, index)])
    shape = vector_shape(index.shape)
    tiles, wanted = _picked(writer, _sources(writer, values), index.reshape(shape), axis)
    if wanted:
        writer.cuts.want(wanted)
        return stand_in(writer, index.shape, first.dtype, axis)
    for place in np.ndindex(tiles.shape):
        tile = tiles[place]
        if isinstance(tile.array, Span):
            tiles[place] = Tile(writer.load(tile.array, first.dtype), tile.width)
    return Tiled(index.shape, first.dtype, axis, tiles)


def cheapest_axis(writer: Writer, moves: Sequence[tuple[Sequence[Value], np.ndarray]]) -> int:
    """The lane axis for several rearranged values of one shape for which the least must be cut; of
    equals the longest, as it makes the fewest tiles."""
    shape = vector_shape(moves[0][1].shape)
    axes = [i for i in range(len(shape)) if fits(shape, i, writer.cuts)]
    if not axes:
        raise Unsupported(TOO_MANY)
    sources = [(_sources(writer, values), index.reshape(shape)) for values, index in moves]

    def cost(axis):
        wanted = set().union(*(_picked(writer, *source, axis)[1] for source in sources))
        return len(wanted), -shape[axis], -axis

    return min(axes, key=cost)


def stand_in(writer: Writer, shape: Sequence[int], dtype: Any, axis: int | None = None) -> Tiled:
    """Any value, with which to go on to find what else must be cut."""
    return filled(shape, dtype, Tile(lax.full((1, 1), 0, dtype), 1), writer.cuts, axis)


def _picked(writer, sources, index, axis):
    """The tiles of the result, not yet loaded, and what must be cut for them: of axes of which
    size, and where."""
    tiles = empty_tiles(index.shape, axis, writer.cuts)
    index = np.moveaxis(index, axis, -1)
    wanted: set[tuple[int, int]] = set()
    for lead in np.ndindex(tiles.shape[:-1]):
        row = index[lead]
        number, lane = sources.elements.tile[row], sources.elements.lane[row]
        for k, (low, high) in enumerate(writer.cuts.segments(len(row))):
            part = slice(low, high)
            tile = _segment(sources, number[part], lane[part])
            if tile is None:
                wanted.update(_missing(sources, number[part], lane[part], len(row), low))
            tiles[(*lead, k)] = tile
    return tiles, wanted


def _segment(sources, number, lane) -> Tile | None:
    """One tile from the elements that it needs, if they lie side by side."""
    width, source = len(number), number[0]
    if (number != source).any():
        return None
    if source < 0:
        return _in_memory(sources.values[-1 - source], lane)
    tile = sources.tiles[source]
    if tile.uniform:
        return Tile(tile.array, width)
    fits = tile.width == width and (lane == np.arange(width)).all()
    return tile if fits else None


def _in_memory(stored: Stored, positions: np.ndarray) -> Tile | None:
    """A tile to be loaded, if the elements are evenly spaced."""
    width = len(positions)
    steps = np.unique(np.diff(positions))
    if len(steps) > 1:
        return None
    step = int(steps[0]) if len(steps) else 0
    span = Span(stored.source, int(positions[0]), (step,), (width if step else 1,))
    return Tile(span, width)


def _missing(sources, number, lane, size, low):
    """What to cut so that a segment of the result, which starts at `low`, can be had."""
    start = 0
    for stop in range(1, len(number) + 1):
        if stop < len(number) and _runs_on(number, lane, start, stop):
            continue
        yield from _inner(size, low + start, low + stop)
        tile = number[start]
        if tile >= 0 and not sources.tiles[tile].uniform:
            axis_size, origin = sources.places[tile]
            first, last = int(lane[start]), int(lane[stop - 1])
            yield from _inner(axis_size, origin + first, origin + last + 1)
        start = stop


def _inner(size: int, *places: int):
    return [(size, place) for place in places if 0 < place < size]


def _runs_on(number, lane, start, stop) -> bool:
    if number[stop] != number[start]:
        return False
    step = lane[stop] - lane[stop - 1]
    if stop > start + 1:
        return bool(step == lane[start + 1] - lane[start])
    return bool(number[stop] < 0 or step in (0, 1))


def laid(writer: Writer, value: Value, shape: Sequence[int], axis: int) -> Tiled:
    """A value with the lane axis `axis`; a scalar is broadcast."""
    shape = tuple(shape)
    if isinstance(value, Tiled) and value.shape == shape and value.axis == axis:
        return value
    index = positions(value.shape)
    if value.shape != shape:
        index = np.broadcast_to(index, shape)
    moved = rearranged(writer, [value], index, axis)
    assert isinstance(moved, Tiled)
    return moved


def together(writer: Writer, values: Sequence[Value], shape: Sequence[int]) -> list[Tiled]:
    """Values with a common lane axis, that of a value in registers if there is one."""
    shape = tuple(shape)
    fixed = [v for v in values if isinstance(v, Tiled) and v.shape == shape and not v.uniform]
    axes = {v.axis for v in fixed}
    if len(axes) > 1:
        axis = cheapest_axis(writer, [([v], positions(shape)) for v in fixed])
    else:
        axis = axes.pop() if axes else default_axis(shape)
    return [laid(writer, v, shape, axis) for v in values]


def stretched(array: Any, shape: tuple[int, ...]) -> Any:
    return array if array.shape == shape else lax.broadcast_in_dim(array, shape, (0, 1))


def tilewise(
    writer: Writer, function: Callable[..., Any], values: Sequence[Value], shape: Sequence[int]
) -> Tiled:
    """A function of single elements, applied to all."""
    values = together(writer, values, shape)
    tiles = object_array(values[0].tiles.shape)
    for place in np.ndindex(tiles.shape):
        parts = [v.tiles[place] for v in values]
        block = tuple(max(p.array.shape[i] for p in parts) for i in range(2))
        array = function(*(stretched(p.array, block) for p in parts))
        tiles[place] = Tile(array, parts[0].width)
    dtype = tiles.flat[0].array.dtype
    return Tiled(tuple(shape), dtype, values[0].axis, tiles)


def masked(array: Any, width: int, axis: int = 1, beyond: Any = 0) -> Any:
    """The same in the first `width` lanes, and `beyond` in all others."""
    if array.shape[axis] == width:
        return array
    lane = lax.broadcasted_iota(np.int32, array.shape, axis)
    return jnp.where(lane < width, array, lax.full(array.shape, beyond, array.dtype))
