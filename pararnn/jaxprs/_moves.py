"""Where the elements of a result come from, for primitives that only move elements.

Each function maps an equation to one array for each result, of the result's shape: the *positions*
of its elements among those of all operands, one operand after another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def positions(shape: Sequence[int], start: int = 0) -> np.ndarray:
    """The numbers of the elements of an array in row-major order, from `start` on."""
    return np.arange(start, start + np.prod(shape, dtype=int)).reshape(shape)


def _all_positions(eqn: Any) -> list[np.ndarray]:
    """The positions of the elements of each operand."""
    shapes = [v.aval.shape for v in eqn.invars]
    starts = np.cumsum([0, *(np.prod(shape, dtype=int) for shape in shapes)])
    return [positions(s, int(o)) for s, o in zip(shapes, starts, strict=False)]


Move = Callable[[Any], Sequence[np.ndarray]]


def _of_one(move: Callable[[np.ndarray, Any, tuple[int, ...]], np.ndarray]) -> Move:
    """The move of a primitive with one operand and one result, from the operand's positions, the
    equation's parameters and the result's shape."""
    return lambda eqn: [
        move(positions(eqn.invars[0].aval.shape), eqn.params, eqn.outvars[0].aval.shape)
    ]


def _broadcast(index, params, shape):
    aligned = [1] * len(shape)
    for axis, size in zip(params["broadcast_dimensions"], index.shape, strict=True):
        aligned[axis] = size
    return np.broadcast_to(index.reshape(aligned), shape)


def _slice(index, params, shape):
    strides = params["strides"] or (1,) * index.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return index[tuple(slice(*b) for b in bounds)]


def _reshape(index, params, shape):
    order = params.get("dimensions")
    return (index if order is None else index.transpose(order)).reshape(shape)


def _split(eqn):
    bounds = np.cumsum(eqn.params["sizes"])[:-1]
    return np.split(positions(eqn.invars[0].aval.shape), bounds, eqn.params["axis"])


def _unstack(eqn):
    return list(np.moveaxis(positions(eqn.invars[0].aval.shape), eqn.params["axis"], 0))


def _pad(eqn):
    """The fill value, the second operand, has the last position."""
    shape, config = eqn.invars[0].aval.shape, eqn.params["padding_config"]
    out = eqn.outvars[0].aval.shape
    index = np.full(out, np.prod(shape, dtype=int))
    source: list[Any] = []
    target: list[Any] = []
    for (low, _, interior), n, m in zip(config, shape, out, strict=True):
        where = low + np.arange(n) * (interior + 1)
        inside = (where >= 0) & (where < m)
        source.append(np.arange(n)[inside])
        target.append(where[inside])
    index[np.ix_(*target)] = positions(shape)[np.ix_(*source)]
    return [index]


MOVES: dict[str, Move] = {
    "transpose": _of_one(lambda index, params, shape: index.transpose(params["permutation"])),
    "rev": _of_one(lambda index, params, shape: np.flip(index, params["dimensions"])),
    "reshape": _of_one(_reshape),
    "tile": _of_one(lambda index, params, shape: np.tile(index, params["reps"])),
    "squeeze": _of_one(lambda index, params, shape: index.reshape(shape)),
    "expand_dims": _of_one(lambda index, params, shape: index.reshape(shape)),
    "broadcast_in_dim": _of_one(_broadcast),
    "slice": _of_one(_slice),
    "split": _split,
    "unstack": _unstack,
    "concatenate": lambda eqn: [np.concatenate(_all_positions(eqn), eqn.params["dimension"])],
    "stack": lambda eqn: [np.stack(_all_positions(eqn), eqn.params["axis"])],
    "pad": _pad,
}
