"""How primitives carry dependence, except those that call or repeat a jaxpr."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from ._moves import MOVES, positions
from ._patterns import (
    Pattern,
    Rule,
    elementwise,
    num_columns,
    num_elements,
    rows,
    union,
    union_over,
)
from ._primitives import Kind, names


def _moved(eqn, patterns):
    width = next(num_columns(p) for p in patterns if p is not None)
    every = [
        sp.csr_array((num_elements(v), width), dtype=bool) if p is None else p
        for v, p in zip(eqn.invars, patterns, strict=True)
    ]
    joined = every[0] if len(every) == 1 else sp.csr_array(sp.vstack(every, format="csr"))
    return [rows(joined, index) for index in MOVES[eqn.primitive.name](eqn)]


def _reduction(eqn, patterns):
    return [union_over(patterns[0], eqn.invars[0].aval.shape, eqn.params["axes"])]


def _cumulative(eqn, patterns):
    shape, axis = eqn.invars[0].aval.shape, eqn.params["axis"]
    reduced = union_over(patterns[0], shape, (axis,))
    kept = np.expand_dims(positions([n for i, n in enumerate(shape) if i != axis]), axis)
    return [rows(reduced, np.broadcast_to(kept, shape))]


def _dot_general(eqn, patterns):
    sides = (_dot_side(eqn, side, p) for side, p in enumerate(patterns) if p is not None)
    return [union(list(sides))]


def _dot_side(eqn: Any, side: int, pattern: sp.csr_array) -> Pattern:
    """The pattern of a product from that of one operand: the union over the contracted axes,
    broadcast along the other operand's free axes."""
    contract, batch = eqn.params["dimension_numbers"]

    def free(side: int) -> Sequence[int]:
        taken = {*contract[side], *batch[side]}
        return [i for i in range(len(eqn.invars[side].aval.shape)) if i not in taken]

    shape = eqn.invars[side].aval.shape
    reduced = union_over(pattern, shape, contract[side])
    kept = [i for i in range(len(shape)) if i not in contract[side]]
    index = positions([shape[i] for i in kept])
    index = index.transpose([kept.index(i) for i in (*batch[side], *free(side))])
    start = len(batch[0]) if side == 1 else index.ndim
    index = np.expand_dims(index, tuple(range(start, start + len(free(1 - side)))))
    return rows(reduced, np.broadcast_to(index, eqn.outvars[0].aval.shape))


def _unchanged(eqn, patterns):
    return patterns


RULES: dict[str, Rule] = {
    **dict.fromkeys(names(Kind.ELEMENTWISE), elementwise),
    **dict.fromkeys(MOVES, _moved),
    # The scatters are reductions too, along axes that the values of an operand tell.
    **{name: _reduction for name in names(Kind.REDUCTION) if not name.startswith("scatter")},
    **dict.fromkeys(names(Kind.CUMULATIVE), _cumulative),
    "dot_general": _dot_general,
    "optimization_barrier": _unchanged,  # of many operands, each by itself
}
