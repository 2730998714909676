"""Where the elements of a result come from, for primitives that only move elements.

Each function answers with the *positions* of the elements in the operand (in all operands, one
after another), as an array of the shape of the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def positions(shape: Sequence[int], start: int = 0) -> np.ndarray:
    return np.arange(start, start + np.prod(shape, dtype=int)).reshape(shape)


def _broadcast(index, params, shape):
    aligned = [1] * len(shape)
    for axis, dim in zip(params["broadcast_dimensions"], index.shape, strict=True):
        aligned[axis] = dim
    return np.broadcast_to(index.reshape(aligned), shape)


def _slice(index, params, shape):
    strides = params["strides"] or (1,) * index.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return index[tuple(slice(*b) for b in bounds)]


def _reshape(index, params, shape):
    order = params.get("dimensions")
    return (index if order is None else index.transpose(order)).reshape(shape)


Move = Callable[[np.ndarray, dict[str, Any], tuple[int, ...]], np.ndarray]
# From the positions of the only operand, the parameters of the equation and the result's shape.
MOVES: dict[str, Move] = {
    "transpose": lambda index, params, shape: index.transpose(params["permutation"]),
    "rev": lambda index, params, shape: np.flip(index, params["dimensions"]),
    "reshape": _reshape,
    "tile": lambda index, params, shape: np.tile(index, params["reps"]),
    **dict.fromkeys(("squeeze", "expand_dims"), lambda index, params, shape: index.reshape(shape)),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
}


def pieces(index: np.ndarray, params: dict[str, Any]) -> list[np.ndarray]:
    """Of `split`, one for each result."""
    return np.split(index, np.cumsum(params["sizes"])[:-1], params["axis"])


def joined(shapes: Sequence[Sequence[int]], params: dict[str, Any]) -> np.ndarray:
    """Of `concatenate`, which has a `dimension`, and of `stack`, which has a new `axis`."""
    offsets = np.cumsum([0, *(np.prod(shape, dtype=int) for shape in shapes)])
    parts = [positions(s, int(o)) for s, o in zip(shapes, offsets, strict=False)]
    if "dimension" in params:
        return np.concatenate(parts, params["dimension"])
    return np.stack(parts, params["axis"])


def padded(shape: Sequence[int], params: dict[str, Any]) -> np.ndarray:
    """Of `pad`, whose operands are an array of this shape and the number that fills."""
    config = params["padding_config"]
    sizes = zip(shape, config, strict=True)
    out = [low + high + n + max(n - 1, 0) * inner for n, (low, high, inner) in sizes]
    index = np.full(out, np.prod(shape, dtype=int))
    source: list[Any] = []
    target: list[Any] = []
    for (low, _, interior), n, m in zip(config, shape, out, strict=True):
        where = low + np.arange(n) * (interior + 1)
        inside = (where >= 0) & (where < m)
        source.append(np.arange(n)[inside])
        target.append(where[inside])
    index[np.ix_(*target)] = positions(shape)[np.ix_(*source)]
    return index
