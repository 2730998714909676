"""Rearranging the elements of tiles, when a kernel is generated: it costs nothing when it runs."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..jaxprs._moves import positions
from ._program import Literal, Unsupported
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
    """The context in which rules generate the code of a step.

    **Arguments:**

    - `cuts`: the places at which the lane axes are cut.
    - `load`: loads the array of a span, of shape (1 or rows, lanes).
    - `rows`: the number of chunks that a program runs at once.
    - `product`: the product of an array (1 or rows, k) with the matrix of a span of two axes.
    """

    cuts: Cuts
    load: Callable[[Span, Any], Any]
    rows: int
    product: Callable[[Any, Span, Any], Any]


def number(literal: Literal) -> Tiled:
    """A literal of the step."""
    value = literal.value
    array = lax.full((1, 1), value[()], value.dtype)
    return filled((), value.dtype, Tile(array, 1), Cuts())


def filled(
    shape: Sequence[int], dtype: Any, tile: Tile, cuts: Cuts, axis: int | None = None
) -> Tiled:
    """A value whose elements are all equal."""
    axis = default_axis(shape) if axis is None else axis
    tiles = empty_tiles(shape, axis, cuts)
    for k, (low, high) in enumerate(cuts.segments(vector_shape(shape)[axis])):
        for lead in np.ndindex(tiles.shape[:-1]):
            tiles[(*lead, k)] = Tile(tile.array, high - low)
    return Tiled(tuple(shape), dtype, axis, tiles)


class _Segment(NamedTuple):
    """A tile in registers, and the part of its lane axis that it holds: `start` and further, of an
    axis of `size` elements."""

    tile: Tile
    size: int
    start: int


class _Sources(NamedTuple):
    """For each element of several values, one value after another: the source that holds it, as an
    index into `sources`, and its offset there, a lane of a segment or a position in memory."""

    sources: Sequence[_Segment | Stored]
    which: np.ndarray
    offset: np.ndarray


def _sources(writer: Writer, values: Sequence[Value]) -> _Sources:
    sources: list[_Segment | Stored] = []
    which, offsets = [], []
    for value in values:
        if isinstance(value, Stored):
            which.append(np.full(value.positions.size, len(sources)))
            offsets.append(value.positions.reshape(-1))
            sources.append(value)
            continue
        size = vector_shape(value.shape)[value.axis]
        segments = writer.cuts.segments(size)
        index = len(sources) + np.arange(value.tiles.size).reshape(value.tiles.shape)
        segment = np.repeat(np.arange(len(segments)), [b - a for a, b in segments])
        lane = np.concatenate([np.arange(b - a) for a, b in segments])
        per_element = np.moveaxis(index[..., segment], -1, value.axis)
        shape = [size if k == value.axis else 1 for k in range(per_element.ndim)]
        which.append(per_element.reshape(-1))
        offsets.append(np.broadcast_to(lane.reshape(shape), per_element.shape).reshape(-1))
        starts = itertools.cycle(start for start, _ in segments)
        sources += map(_Segment, value.tiles.reshape(-1), itertools.repeat(size), starts)
    return _Sources(sources, np.concatenate(which), np.concatenate(offsets))


def rearranged(
    writer: Writer, values: Sequence[Value], index: np.ndarray, axis: int | None = None
) -> Value:
    """The elements at the positions `index` of the concatenated values.

    **Arguments:**

    - `axis`: the lane axis of the result; by default the one that needs the fewest cuts.
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
    """The common lane axis of several rearranged values of one shape that needs the fewest cuts;
    among equals the longest, which makes the fewest tiles."""
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
    """A placeholder of this shape, so that an attempt can go on and collect all cuts."""
    return filled(shape, dtype, Tile(lax.full((1, 1), 0, dtype), 1), writer.cuts, axis)


def _picked(
    writer: Writer, sources: _Sources, index: np.ndarray, axis: int
) -> tuple[Any, set[tuple[int, int]]]:
    """The tiles of the result, those in memory not yet loaded (a `Span` in place of the array); and
    the cuts that they need, each the size of an axis and a place on it."""
    tiles = empty_tiles(index.shape, axis, writer.cuts)
    index = np.moveaxis(index, axis, -1)
    wanted: set[tuple[int, int]] = set()
    for lead in np.ndindex(tiles.shape[:-1]):
        row = index[lead]
        which, offset = sources.which[row], sources.offset[row]
        for k, (low, high) in enumerate(writer.cuts.segments(len(row))):
            part = slice(low, high)
            tile = _one_tile(sources.sources, which[part], offset[part])
            if tile is None:
                runs = _runs(sources.sources, which[part], offset[part])
                wanted.update(_cuts_between(sources, row[part], runs, len(row), low))
            tiles[(*lead, k)] = tile
    return tiles, wanted


def _one_tile(
    sources: Sequence[_Segment | Stored], which: np.ndarray, offset: np.ndarray
) -> Tile | None:
    """The tile of a segment of the result, or `None` if its elements do not come from one source,
    side by side."""
    if (which != which[0]).any():
        return None
    source, width = sources[int(which[0])], len(which)
    if isinstance(source, Stored):
        return _in_memory(source, offset)
    if source.tile.uniform:
        return Tile(source.tile.array, width)
    whole = source.tile.width == width and (offset == np.arange(width)).all()
    return source.tile if whole else None


def _in_memory(stored: Stored, positions: np.ndarray) -> Tile | None:
    """A tile to be loaded, or `None` if the elements are not evenly spaced."""
    width = len(positions)
    steps = np.unique(np.diff(positions))
    if len(steps) > 1:
        return None
    step = int(steps[0]) if len(steps) else 0
    span = Span(stored.source, int(positions[0]), (step,), (width if step else 1,))
    return Tile(span, width)


def _runs(
    sources: Sequence[_Segment | Stored], which: np.ndarray, offset: np.ndarray
) -> Iterator[tuple[int, int]]:
    """The bounds of the longest runs of elements that one tile could hold."""
    start = 0
    for stop in range(1, len(which) + 1):
        if stop < len(which) and _continues(sources, which, offset, start, stop):
            continue
        yield start, stop
        start = stop


def _continues(sources, which, offset, start, stop) -> bool:
    """Whether the element `stop` belongs to the run that begins at `start`."""
    if which[stop] != which[start]:
        return False
    step = offset[stop] - offset[stop - 1]
    if stop > start + 1:
        return bool(step == offset[start + 1] - offset[start])
    return isinstance(sources[int(which[stop])], Stored) or bool(step in (0, 1))


def _cuts_between(
    sources: _Sources, row: np.ndarray, runs: Iterable[tuple[int, int]], size: int, low: int
) -> Iterator[tuple[int, int]]:
    """The cuts that make each run a tile of its own: of the result's axis, of `size` elements, on
    which the runs begin at `low`; and of the axes of the sources."""
    for start, stop in runs:
        yield from _inner(size, low + start, low + stop)
        source = sources.sources[int(sources.which[row[start]])]
        if isinstance(source, _Segment) and not source.tile.uniform:
            first, last = (int(sources.offset[row[i]]) for i in (start, stop - 1))
            yield from _inner(source.size, source.start + first, source.start + last + 1)


def _inner(size: int, *places: int) -> list[tuple[int, int]]:
    """The places that are not an end of the axis."""
    return [(size, place) for place in places if 0 < place < size]


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
    """Values in a common lane axis, that of a value in registers if there is one."""
    shape = tuple(shape)
    in_registers = [
        v for v in values if isinstance(v, Tiled) and v.shape == shape and not v.uniform
    ]
    axes = {v.axis for v in in_registers}
    if len(axes) > 1:
        axis = cheapest_axis(writer, [([v], positions(shape)) for v in in_registers])
    else:
        axis = axes.pop() if axes else default_axis(shape)
    return [laid(writer, v, shape, axis) for v in values]


def stretched(array: Any, shape: tuple[int, ...]) -> Any:
    return array if array.shape == shape else lax.broadcast_in_dim(array, shape, (0, 1))


def tilewise(
    writer: Writer, function: Callable[..., Any], values: Sequence[Value], shape: Sequence[int]
) -> Tiled:
    """Applies an elementwise function."""
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
    """`array` with the lanes from `width` on replaced by `beyond`."""
    if array.shape[axis] == width:
        return array
    lane = lax.broadcasted_iota(np.int32, array.shape, axis)
    return jnp.where(lane < width, array, lax.full(array.shape, beyond, array.dtype))
