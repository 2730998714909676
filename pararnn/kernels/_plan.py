"""The plan of a kernel: the places where values are cut, and the spans that it loads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _pallas
from ._layout import Writer, laid, stretched
from ._program import Program, Unsupported
from ._rules import stored, write
from ._tiles import Cuts, Span, Tile, Tiled, Value, default_axis, empty_tiles, lanes_of

# The most operations on tiles of a step; more take long to compile.
MAX_OPERATIONS = 1000
# The most elements of the state; more do not fit into the registers of the largest program.
MAX_LANES = 4096
# Cuts of one attempt lead to more cuts in the next.
_MAX_ATTEMPTS = 24


class Plan(NamedTuple):
    """**Fields:**

    - `cuts`: the places at which axes are cut.
    - `spans`: the spans that the program loads, and their dtypes.
    - `lanes`: the number of lanes of each tile of the carry.
    - `operations`: the number of operations on tiles of a step.
    """

    cuts: Cuts
    spans: dict[Span, Any]
    lanes: list[int]
    operations: int

    @property
    def inputs(self) -> list[Span]:
        return [span for span in self.spans if span.source[0] == "input"]

    @property
    def vectors(self) -> list[Span]:
        """The spans of constants with one axis."""
        return [s for s in self.spans if s.source[0] == "constant" and len(s.widths) == 1]

    @property
    def matrices(self) -> list[Span]:
        return [span for span in self.spans if len(span.widths) == 2]


def make_plan(program: Program) -> Plan:
    """Generates the step again and again until no more cuts are needed."""
    cuts = Cuts()
    for _ in range(_MAX_ATTEMPTS):
        plan = _attempt(program, cuts)
        if cuts.satisfied:
            _check_sizes(plan)
            return plan
        cuts.grow()
    raise Unsupported("moves elements in a way that needs too many pieces")


def _check_sizes(plan: Plan) -> None:
    if max(plan.lanes, default=0) > MAX_LANES:
        raise Unsupported(f"has a state of more than {MAX_LANES} units")
    for span in plan.matrices:
        dtype, (size, columns) = plan.spans[span], span.widths
        if not _pallas.multiplies(lanes_of(size), lanes_of(columns), dtype):
            raise Unsupported(f"multiplies by a {dtype} matrix of {size} × {columns}")


def _attempt(program: Program, cuts: Cuts) -> Plan:
    spans: dict[Span, Any] = {}
    lanes: list[int] = []

    def load(span, dtype):
        spans[span] = dtype
        return lax.full((1, lanes_of(*span.widths)), 0, dtype)

    def product(vectors, span, dtype):
        spans[span] = dtype
        return lax.full((vectors.shape[0], lanes_of(span.widths[1])), 0, np.float32)

    def step():
        writer = Writer(cuts, load, 1, product)
        carry = [_zeros(leaf, cuts) for leaf in program.carry]
        lanes.extend(t.array.shape[1] for value in carry for t in value.tiles.flat)
        return flat_carry(writer, program, carry)

    closed = jax.make_jaxpr(step)()
    if len(closed.jaxpr.eqns) > MAX_OPERATIONS:
        raise Unsupported("needs too many operations")
    return Plan(cuts, spans, lanes, len(closed.jaxpr.eqns))


def _zeros(leaf: jax.ShapeDtypeStruct, cuts: Cuts) -> Tiled:
    def tile(low, high):
        return Tile(lax.full((1, lanes_of(high - low)), 0, leaf.dtype), high - low)

    return from_segments(leaf, cuts, tile)


def from_segments(leaf: jax.ShapeDtypeStruct, cuts: Cuts, tile: Any) -> Tiled:
    """A value of the carry; `tile(low, high)` makes the tile of each segment, in order."""
    axis = default_axis(leaf.shape)
    tiles = empty_tiles(leaf.shape, axis, cuts)
    size = leaf.shape[axis] if leaf.shape else 1
    segments = cuts.segments(size)
    for place in np.ndindex(tiles.shape):
        tiles[place] = tile(*segments[place[-1]])
    return Tiled(tuple(leaf.shape), leaf.dtype, axis, tiles)


def flat_carry(writer: Writer, program: Program, carry: Sequence[Value]) -> list[jax.Array]:
    """The arrays of the next carry, tile after tile."""
    inputs = [stored(("input", k), leaf) for k, leaf in enumerate(program.inputs)]
    results = write(writer, program, [*carry, *inputs])
    arrays = []
    for leaf, value in zip(program.carry, results, strict=True):
        value = laid(writer, value, leaf.shape, default_axis(leaf.shape))
        for tile in value.tiles.flat:
            shape = (writer.rows, lanes_of(tile.width))
            arrays.append(stretched(tile.array, shape).astype(jnp.dtype(leaf.dtype)))
    return arrays
