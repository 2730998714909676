"""The code of each primitive in a kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..jaxprs._moves import MOVES, positions
from ._elementwise import NAMES, elementwise, maximum, minimum, widened
from ._layout import Writer, laid, masked, number, rearranged, stand_in, stretched, tilewise
from ._products import dot_general
from ._program import Constant, Literal, Operand, Program, Unsupported, check_dtype
from ._tiles import Stored, Tile, Tiled, Value, default_axis, object_array, vector_shape

Rule = Callable[[Writer, Any, Sequence[Value]], Sequence[Value]]


def write(writer: Writer, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """Generates a step: its results from its carry and its input."""
    values: dict[Any, Value] = dict(enumerate(inputs))
    numbers = {id(array): k for k, array in enumerate(program.constants())}

    def read(operand: Operand) -> Value:
        if isinstance(operand, Literal):
            return number(operand)
        if isinstance(operand, Constant):
            source = ("constant", numbers[id(operand.base)])
            return Stored(source, operand.positions, operand.base.dtype)
        return values[operand.number]

    for op in program.operations:
        outs = _rule(op.eqn)(writer, op.eqn, [read(i) for i in op.ins])
        for slot, value in zip(op.outs, outs, strict=True):
            values[slot.number] = value
    return [read(r) for r in program.results]


def stored(source: Any, array: Any) -> Stored:
    """The value of a whole array in memory."""
    return Stored(source, positions(array.shape), array.dtype)


def _rule(eqn: Any) -> Rule:
    name = eqn.primitive.name
    for v in (*eqn.invars, *eqn.outvars):
        check_dtype(v.aval.dtype)
        if v.aval.size == 0:
            raise Unsupported("has empty arrays")
    if name in NAMES:
        return _elementwise
    if name not in RULES:
        raise Unsupported(f"uses `{name}`")
    return RULES[name]


def _elementwise(writer, eqn, ins):
    return [tilewise(writer, elementwise(eqn), ins, eqn.outvars[0].aval.shape)]


# --- moving elements ----------------------------------------------------------------------------


def _positions(eqn: Any) -> np.ndarray:
    return positions(eqn.invars[0].aval.shape)


def _moved(writer, eqn, ins):
    return [rearranged(writer, ins, index) for index in MOVES[eqn.primitive.name](eqn)]


def _starts(eqn: Any, atoms: Sequence[Any], shape: Sequence[int]) -> list[slice]:
    """The slices of a window of this shape; JAX clamps it into the operand."""
    if not all(hasattr(a, "val") for a in atoms):
        raise Unsupported(f"uses `{eqn.primitive.name}` at an index that is computed")
    limits = eqn.invars[0].aval.shape
    bounds = zip(atoms, shape, limits, strict=True)
    starts = [(min(max(int(a.val), 0), limit - size), size) for a, size, limit in bounds]
    return [slice(start, start + size) for start, size in starts]


def _dynamic_slice(writer, eqn, ins):
    window = _starts(eqn, eqn.invars[1:], eqn.outvars[0].aval.shape)
    return [rearranged(writer, ins[:1], _positions(eqn)[tuple(window)])]


def _dynamic_update_slice(writer, eqn, ins):
    index = _positions(eqn)
    shape = eqn.invars[1].aval.shape
    window = _starts(eqn, eqn.invars[2:], shape)
    index[tuple(window)] = index.size + positions(shape)
    return [rearranged(writer, ins[:2], index)]


# --- reductions ---------------------------------------------------------------------------------


def _sum(x, axis):
    return jnp.sum(x, axis, keepdims=True, dtype=x.dtype)


def _extreme(reduce):
    def of(x, axis):
        found = reduce(x, axis, keepdims=True)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return found
        broken = jnp.max((x != x).astype(np.int32), axis, keepdims=True)
        return jnp.where(broken > 0, lax.full(found.shape, np.nan, x.dtype), found)

    return of


def _truth(reduce):
    def of(x, axis):
        return reduce(x.astype(np.int32), axis, keepdims=True) > 0

    return of


def _lowest(dtype, sign):
    """The neutral element of the maximum (`sign` -1) or the minimum (`sign` 1)."""
    if jnp.issubdtype(dtype, jnp.floating):
        return sign * np.inf
    return jnp.iinfo(dtype).min if sign < 0 else jnp.iinfo(dtype).max


# The reduction over lanes, that of two tiles, and its neutral element, which fills unused lanes.
_REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "reduce_sum": (_sum, lax.add, lambda dtype: 0),
    "reduce_max": (_extreme(jnp.max), maximum, lambda dtype: _lowest(dtype, -1)),
    "reduce_min": (_extreme(jnp.min), minimum, lambda dtype: _lowest(dtype, 1)),
    "reduce_or": (_truth(jnp.max), jnp.logical_or, lambda dtype: False),
    "reduce_and": (_truth(jnp.min), jnp.logical_and, lambda dtype: True),
}


# The names of reductions of booleans.
_OF_BOOLEANS = {"reduce_max": "reduce_or", "reduce_min": "reduce_and"}


def _reduce(writer, eqn, ins):
    # Of a transposed broadcast, JAX 0.10.2 gives the axes as NumPy integers.
    (value,), axes = ins, {int(axis) for axis in eqn.params["axes"]}
    name: str = eqn.primitive.name
    if value.dtype == np.bool_:
        name = _OF_BOOLEANS.get(name, name)
    elif name in _OF_BOOLEANS.values():
        raise Unsupported(f"uses `{name}` of integers")
    return [reduced(writer, value, axes, name)]


def reduced(writer: Writer, value: Value, axes: set[int], name: str) -> Tiled:
    """Reduces a value over axes, narrower numbers in float32."""
    shape = vector_shape(value.shape)
    if isinstance(value, Stored):
        value = laid(writer, value, value.shape, default_axis(shape))
    over_lanes, pair, _ = _REDUCTIONS[name]
    others = [i for i in range(len(shape)) if i != value.axis]
    lead = [k for k, i in enumerate(others) if i in axes]
    tiles = np.moveaxis(value.tiles, lead, range(len(lead)))
    tiles = tiles.reshape(-1, *tiles.shape[len(lead) :])
    arrays = object_array(tiles.shape[1:])
    for place in np.ndindex(arrays.shape):
        parts = [t.array for t in tiles[(slice(None), *place)]]
        arrays[place] = Tile(_folded(pair, parts), tiles[(0, *place)].width)
    out = tuple(n for i, n in enumerate(value.shape) if i not in axes)
    if value.axis not in axes:
        axis = sum(i < value.axis and i not in axes for i in range(len(shape)))
        return Tiled(out, value.dtype, axis, arrays)
    single = object_array(arrays.shape[:-1])
    for place in np.ndindex(single.shape):
        parts = [_over_lanes(over_lanes, name, t) for t in arrays[place]]
        single[place] = Tile(_folded(pair, parts), 1)
    return _from_elements(writer, single, out, value.dtype)


def _folded(pair, arrays):
    total = widened(arrays[0])
    for array in arrays[1:]:
        shape = tuple(map(max, total.shape, array.shape))
        total = pair(stretched(total, shape), stretched(widened(array), shape))
    return total.astype(arrays[0].dtype)


def _over_lanes(over_lanes, name, tile):
    array = widened(tile.array)
    if tile.uniform:
        return (array * tile.width if name == "reduce_sum" else array).astype(tile.array.dtype)
    beyond = _REDUCTIONS[name][2](array.dtype)
    return over_lanes(masked(array, tile.width, beyond=beyond), 1).astype(tile.array.dtype)


def _from_elements(writer, elements, shape, dtype) -> Tiled:
    """A value from one tile per element, with the shortest axis as the lane axis."""
    full = vector_shape(shape)
    axis = min(range(len(full)), key=lambda i: (full[i], -i))
    if full[axis] > len(writer.cuts.segments(full[axis])):
        writer.cuts.want((full[axis], place) for place in range(1, full[axis]))
        return stand_in(writer, shape, dtype, axis)
    return Tiled(shape, dtype, axis, np.moveaxis(elements.reshape(full), axis, -1))


def _barrier(writer, eqn, ins):
    return ins


def _dot(writer, eqn, ins):
    return [dot_general(writer, eqn, ins, reduced)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _moved),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "optimization_barrier": _barrier,
    "dot_general": _dot,
}
