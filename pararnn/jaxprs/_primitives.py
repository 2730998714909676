"""How JAX's own primitives carry dependence, beyond those that call or repeat a jaxpr."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from ._moves import MOVES, Move, joined, padded, pieces
from ._patterns import (
    Pattern,
    Rule,
    all_to_all,
    elementwise,
    num_columns,
    num_elements,
    positions,
    rows,
    union,
    union_over,
)

# Derivatives are linear in the tangent, but loop bodies and untraced rules may mix in any of these.
_ELEMENTWISE = (
    "add add_any sub mul div neg max min select_n clamp convert_element_type reduce_precision copy "
    "real imag conj complex abs sign pow integer_pow square sqrt rsqrt exp log tanh logistic"
).split()


def _moved(move: Move) -> Rule:
    def rule(eqn, patterns):
        shape, params = eqn.outvars[0].aval.shape, eqn.params
        return [rows(patterns[0], move(positions(eqn.invars[0].aval.shape), params, shape))]

    return rule


def _split(eqn, patterns):
    index = positions(eqn.invars[0].aval.shape)
    return [rows(patterns[0], piece) for piece in pieces(index, eqn.params)]


def _unstack(eqn, patterns):
    parts = np.moveaxis(positions(eqn.invars[0].aval.shape), eqn.params["axis"], 0)
    return [rows(patterns[0], part) for part in parts]


def _joined(eqn, patterns):
    width = next(num_columns(p) for p in patterns if p is not None)
    stacked = [
        sp.csr_array((num_elements(v), width), dtype=bool) if p is None else p
        for v, p in zip(eqn.invars, patterns, strict=True)
    ]
    index = joined([v.aval.shape for v in eqn.invars], eqn.params)
    return [rows(sp.csr_array(sp.vstack(stacked, format="csr")), index)]


def _pad(eqn, patterns):
    operand, fill = patterns
    if fill is not None:
        return all_to_all(eqn, patterns)
    index = padded(eqn.invars[0].aval.shape, eqn.params)
    empty = sp.csr_array((1, num_columns(operand)), dtype=bool)
    return [rows(sp.csr_array(sp.vstack([operand, empty], format="csr")), index)]


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
    """The union over the contracted axes, then a broadcast along the other operand's free axes."""
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


PRIMITIVES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **{name: _moved(move) for name, move in MOVES.items()},
    "split": _split,
    "concatenate": _joined,
    "stack": _joined,
    "unstack": _unstack,
    "pad": _pad,
    "dot_general": _dot_general,
    **dict.fromkeys("reduce_sum reduce_max reduce_min reduce_prod".split(), _reduction),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _cumulative),
}
