"""Values in a kernel: arrays in pieces that fit registers.

A kernel runs a block of chunks at once, and every value of the step has one entry for each. One of
its axes, its *lane axis*, lies along the lanes of the processor, cut into segments; all others are
enumerated in Python. So a value is an object array of tiles, and moving its elements is done while
the kernel is written, not while it runs.

Registers cannot be cut. Where all values of one size must be cut (because one is split, reshaped
into heads, or joined from parts) is therefore found out before: `Cuts` collects the places, and
the writing starts again until nothing is added.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._program import Unsupported

# More tiles than this for one value are more than a thread's registers hold.
MAX_TILES = 64
TOO_MANY = f"has a value of more than {MAX_TILES} pieces: too many for registers"


def lanes_of(width: int) -> int:
    """The lanes that a segment takes: the next power of two."""
    return 1 << (width - 1).bit_length()


class Tile(NamedTuple):
    """A segment: an array of shape (1 or rows, 1 or lanes), of which `width` lanes mean something.
    One lane of a wider segment stands for all."""

    array: Any
    width: int

    @property
    def uniform(self) -> bool:
        return self.array.shape[1] == 1


# An array in memory: what it is ("input", "constant", …), and which of these.
Source = tuple[str, int]


class Span(NamedTuple):
    """Which elements of a stored array a load takes: along each axis of the result, how many and
    how far apart."""

    source: Source
    start: int
    steps: tuple[int, ...]
    widths: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A value in memory, loaded piece by piece where it is used; `positions` of its elements."""

    source: Source
    positions: np.ndarray
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.positions.shape


@dataclasses.dataclass(frozen=True, eq=False)
class Tiled:
    """A value in registers: `tiles` has all axes of `shape` but the lane axis, which comes last and
    has one entry for each segment. A scalar is a vector of one."""

    shape: tuple[int, ...]
    dtype: Any
    axis: int
    tiles: Any

    @property
    def uniform(self) -> bool:
        """Whether the lanes of each tile are the same, so that they go with any lane axis of a
        value that is constant along this one."""
        return all(t.uniform for t in self.tiles.flat)


Value = Stored | Tiled


class Cuts:
    """Where axes of each size are cut. What is `want`ed is used from the next attempt on."""

    def __init__(self):
        self._places: dict[int, set[int]] = {}
        self._wanted: set[tuple[int, int]] = set()

    def segments(self, size: int) -> list[tuple[int, int]]:
        places = sorted({0, size, *self._places.get(size, ())})
        return list(zip(places, places[1:], strict=False))

    def want(self, places: Iterable[tuple[int, int]]) -> None:
        """Asks for cuts: of axes of which size, and where."""
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
    """Whether a value of this shape is of few enough tiles."""
    return math.prod(_tiles_shape(shape, axis, cuts)) <= MAX_TILES


def empty_tiles(shape: Sequence[int], axis: int, cuts: Cuts) -> Any:
    """An array for the tiles of a value of this shape."""
    return object_array(_tiles_shape(shape, axis, cuts))
