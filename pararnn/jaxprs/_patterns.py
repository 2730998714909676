"""Patterns of dependence: which elements of the state an element of a value may depend on.

A pattern is sound if it contains the true dependence; it may be larger.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.extend.core as jex_core
import numpy as np
import scipy.sparse as sp

from ._moves import positions

Pattern: TypeAlias = sp.csr_array | None
"""A boolean matrix (elements of a value, in row-major order × elements of the state) whose entries
tell what may depend on what, or `None` where nothing depends on the state."""
Rule: TypeAlias = Callable[[jex_core.JaxprEqn, list[Pattern]], Sequence[Pattern]]
"""`rule(eqn, patterns)`, from the patterns of an equation's operands, at least one of which is not
`None`, to one pattern for each of its results."""

# The analysis gives up on patterns of more entries: it would take too long.
_MAX_ENTRIES = 5_000_000


class TooDenseError(Exception):
    """The analysis gave up: treat the Jacobian as dense."""


# --- public rules -------------------------------------------------------------------------------


def elementwise(eqn: jex_core.JaxprEqn, patterns: Sequence[Pattern]) -> list[Pattern]:
    """The rule of elementwise primitives: each element of a result depends on the elements of the
    operands in the same place. Operands are broadcast as by NumPy.

    **Arguments:**

    - `eqn`: the equation.
    - `patterns`: the patterns of its operands.

    **Returns:**

    The pattern of each result.
    """
    return [
        union([_broadcast(eqn, v, p, out) for v, p in zip(eqn.invars, patterns, strict=True)])
        for out in eqn.outvars
    ]


def _broadcast(eqn, var, pattern, out):
    shape, wanted = var.aval.shape, out.aval.shape
    if pattern is None or shape == wanted:
        return pattern
    try:
        index = np.broadcast_to(positions(shape), wanted)
    except ValueError:
        raise ValueError(
            f"`elementwise` was registered for the primitive `{eqn.primitive.name}`, but an "
            f"operand of shape {shape} does not broadcast to its result of shape {wanted}. Write "
            "a rule that tells which elements of the operand each element of the result takes, or "
            "register `all_to_all`."
        ) from None
    return rows(pattern, index)


def all_to_all(eqn: jex_core.JaxprEqn, patterns: Sequence[Pattern]) -> list[Pattern]:
    """The rule of primitives that have no other: each element of each result depends on everything
    that any element of any operand depends on.

    **Arguments:**

    - `eqn`: the equation.
    - `patterns`: the patterns of its operands.

    **Returns:**

    The pattern of each result.
    """
    total = union([union_over(p, (num_rows(p),), (0,)) for p in patterns if p is not None])
    if total is None:
        return [None] * len(eqn.outvars)
    return [rows(total, np.zeros(num_elements(v), int)) for v in eqn.outvars]


# --- operations on patterns ---------------------------------------------------------------------


def num_elements(var: Any) -> int:
    return math.prod(var.aval.shape)


def num_rows(pattern: sp.csr_array) -> int:
    # SciPy 1.17 has no annotations: pyright infers `shape` from the base class's initial `None`.
    return pattern.shape[0]  # pyright: ignore[reportOptionalSubscript]


def num_columns(pattern: sp.csr_array) -> int:
    return pattern.shape[1]  # pyright: ignore[reportOptionalSubscript]


def affordable(pattern: sp.csr_array) -> sp.csr_array:
    """The pattern; raises `TooDenseError` if it has too many entries."""
    _afford(pattern.nnz)
    return pattern


def _afford(entries: int) -> None:
    if entries > _MAX_ENTRIES:
        raise TooDenseError


def rows(pattern: sp.csr_array, index: np.ndarray) -> sp.csr_array:
    """Output element `i` depends on what element `index[i]` of the input depends on."""
    index = index.reshape(-1)
    _afford(int(np.diff(pattern.indptr)[index].sum(dtype=np.int64)))  # before they take memory
    return pattern[index]


def union(patterns: Sequence[Pattern]) -> Pattern:
    known = [p for p in patterns if p is not None]
    return affordable(functools.reduce(lambda a, b: a + b, known)) if known else None


def union_over(pattern: sp.csr_array, shape: Sequence[int], axes: Sequence[int]) -> sp.csr_array:
    """The pattern of a reduction over `axes` of a value of shape `shape`."""
    kept = [n for i, n in enumerate(shape) if i not in axes]
    target = np.expand_dims(positions(kept), tuple(axes))
    target = np.broadcast_to(target, shape).reshape(-1)
    ones = np.ones(target.size, bool)
    gather = sp.csr_array(
        (ones, (target, np.arange(target.size))), shape=(math.prod(kept), target.size)
    )
    return affordable(sp.csr_array(gather @ pattern, dtype=bool))
