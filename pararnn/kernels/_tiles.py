"""Values in a kernel: arrays cut into tiles that fit registers.

A kernel runs a block of chunks at once, and every value of the step has one entry for each. One of
its axes, its *lane axis*, lies along the lanes of the processor, cut into segments; all others are
enumerated in Python. So a value is an object array of tiles, and moving its elements is done while
the kernel is written, not while it runs.

Arrays in registers cannot be sliced. The places at which axes of one size must be cut (because a
value is split, reshaped into heads, or concatenated) are therefore determined first: `Cuts`
collects them, and the kernel is generated again until no cut is added.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._program import Unsupported

# The most tiles of a value: a thread has no registers for more.
MAX_TILES = 64
TOO_MANY = f"has a value of more than {MAX_TILES} pieces: too many for registers"


def lanes_of(width: int) -> int:
    """The lanes that a segment occupies: the next power of two."""
    return 1 << (width - 1).bit_length()


class Tile(NamedTuple):
    """A segment of the lane axis: an array of shape (1 or rows, 1 or lanes), of which `width` lanes
    are used. An array of one lane is broadcast to all."""

    array: Any
    width: int

    @property
    def uniform(self) -> bool:
        return self.array.shape[1] == 1


# An array in memory: its kind ("input", "constant", …) and its number.
Source = tuple[str, int]


class Span(NamedTuple):
    """The elements of a stored array that one load reads: along each axis of the result, their
    distance and their number."""

    source: Source
    start: int
    steps: tuple[int, ...]
    widths: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A value in memory, at `positions` of `source`; tiles are loaded where they are used."""

    source: Source
    positions: np.ndarray
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.positions.shape


@dataclasses.dataclass(frozen=True, eq=False)
class Tiled:
    """A value in registers: `tiles` has the axes of `shape` without the lane axis, then an axis of
    the lane axis's segments. A scalar is a vector of one element."""

    shape: tuple[int, ...]
    dtype: Any
    axis: int
    tiles: Any

    @property
    def uniform(self) -> bool:
        """Whether all lanes of each tile are equal."""
        return all(t.uniform for t in self.tiles.flat)


Value = Stored | Tiled


class Cuts:
    """The places at which axes of each size are cut. `want` adds some for the next attempt."""

    def __init__(self):
        self._places: dict[int, set[int]] = {}
        self._wanted: set[tuple[int, int]] = set()

    def segments(self, size: int) -> list[tuple[int, int]]:
        places = sorted({0, size, *self._places.get(size, ())})
        return list(zip(places, places[1:], strict=False))

    def want(self, places: Iterable[tuple[int, int]]) -> None:
        """Requests cuts, each the size of an axis and a place on it."""
        self._wanted.update(places)

    @property
    def satisfied(self) -> bool:
        return not self._wanted

    def grow(self) -> None:
        for size, place in self._wanted:
            self._places.setdefault(size, set()).add(place)
            if len(self._places[size]) >= MAX_TILES:
                raise Unsupported("moves elements in a way that needs too many pieces")
        self._wanted.clear()


def vector_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape) or (1,)


def default_axis(shape: Sequence[int]) -> int:
    """The longest axis, the last of several."""
    shape = vector_shape(shape)
    return max(range(len(shape)), key=lambda i: (shape[i], i))


def object_array(shape: Sequence[int]) -> Any:
    if np.prod(shape, dtype=int) > MAX_TILES:
        raise Unsupported(TOO_MANY)
    return np.empty(shape, object)


def _tiles_shape(shape: Sequence[int], axis: int, cuts: Cuts) -> tuple[int, ...]:
    shape = vector_shape(shape)
    lead = [n for i, n in enumerate(shape) if i != axis]
    return (*lead, len(cuts.segments(shape[axis])))


def fits(shape: Sequence[int], axis: int, cuts: Cuts) -> bool:
    """Whether a value of this shape has at most `MAX_TILES` tiles."""
    return math.prod(_tiles_shape(shape, axis, cuts)) <= MAX_TILES


def empty_tiles(shape: Sequence[int], axis: int, cuts: Cuts) -> Any:
    """An empty array for the tiles of a value of this shape."""
    return object_array(_tiles_shape(shape, axis, cuts))
