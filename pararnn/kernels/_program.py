"""A user's step as a flat list of equations that depend on the carry or the input.

Calls are inlined. Equations that depend on constants only (a weight's transpose, `1 - decay`) are
evaluated here, once and outside the kernel; their results are the program's constants.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..jaxprs._moves import MOVES, positions
from ..jaxprs._walk import called, evaluate_alone, open_jaxpr, walk


class Unsupported(Exception):  # noqa: N818 (never reaches users)
    """The reason why a step cannot become a kernel, a phrase that continues "the step"."""


# The dtypes that a kernel computes with.
_DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 bfloat16 float16 float32 float64".split()
)


def check_dtype(dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise Unsupported("computes with complex numbers")
    if str(dtype) not in _DTYPES:
        raise Unsupported(f"has arrays of {dtype}")


class Slot(NamedTuple):
    """A value that the kernel computes or reads at every step."""

    number: int


class Constant(NamedTuple):
    """A constant: `array`, whose elements are those of `base` at the evenly spaced `positions`, so
    that a slice of a weight need not be copied."""

    array: Any
    base: Any
    positions: np.ndarray


class Literal(NamedTuple):
    """A literal scalar of the step."""

    value: np.ndarray


Operand = Slot | Constant | Literal


class Operation(NamedTuple):
    """An equation, with its operands and its results."""

    eqn: Any
    ins: Sequence[Operand]
    outs: Sequence[Slot]


class Program(NamedTuple):
    """A step as operations. Slots 0, 1, … are the leaves of the carry and then of the input; leaves
    without elements are left out everywhere."""

    operations: Sequence[Operation]
    results: Sequence[Operand]
    carry: Sequence[jax.ShapeDtypeStruct]
    inputs: Sequence[jax.ShapeDtypeStruct]

    def constants(self) -> list[Any]:
        """The distinct arrays that operations and results refer to."""
        found: dict[int, Any] = {}
        for ins in (*(op.ins for op in self.operations), self.results):
            for x in ins:
                if isinstance(x, Constant):
                    found.setdefault(id(x.base), x.base)
        return list(found.values())


def trace(step: Callable[..., Any], carry: PyTree[Any], x: PyTree[Any]) -> Program:
    """The program of a step for a carry and an input of these shapes and dtypes."""
    closed, shape = jax.make_jaxpr(step, return_shape=True)(carry, x)
    carries, inputs = (without_empty(jtu.tree_leaves(tree)) for tree in (carry, x))
    _check_carry(carry, shape)
    for leaf in (*carries, *inputs):
        check_dtype(leaf.dtype)
    if not carries:
        raise Unsupported("has an empty state")
    operations: list[Operation] = []
    num_slots = len(carries) + len(inputs)

    def rule(eqn, ins):
        nonlocal num_slots
        call = called(eqn)
        if call is not None:
            jaxpr, consts = open_jaxpr(call.jaxpr)
            args = call.args(ins)
            return walk(jaxpr, args, rule, literal=_literal, consts=[*map(_as_operand, consts)])
        if eqn.effects:
            raise Unsupported(f"uses `{eqn.primitive.name}`, which has an effect")
        if all(v.aval.size == 0 for v in eqn.outvars):
            return [_empty(v.aval) for v in eqn.outvars]
        constants = [i for i in ins if not isinstance(i, Slot)]
        if len(constants) == len(ins) and not _is_fill(eqn, ins):
            return _evaluated(eqn, constants)
        outs = [Slot(num_slots + k) for k in range(len(eqn.outvars))]
        num_slots += len(outs)
        operations.append(Operation(eqn, ins, outs))
        return outs

    jaxpr, consts = open_jaxpr(closed)
    numbers = itertools.count()
    args = [Slot(next(numbers)) if v.aval.size else _empty(v.aval) for v in jaxpr.invars]
    constants = [_as_operand(c) for c in consts]
    outs = walk(jaxpr, args, rule, literal=_literal, consts=constants)
    results = [out for out, v in zip(outs, jaxpr.outvars, strict=True) if v.aval.size]
    return Program(_needed(operations, results), results, carries, inputs)


def without_empty(arrays: Sequence[Any], first: int = 0) -> list[Any]:
    """The arrays that have elements along the axes from `first` on."""
    return [x for x in arrays if math.prod(x.shape[first:])]


def _check_carry(carry: PyTree[Any], out: PyTree[Any]) -> None:
    def described(tree):
        leaves, treedef = jtu.tree_flatten(tree)
        return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]

    if described(carry) != described(out):
        raise Unsupported("makes a carry of other shapes or dtypes than the one it takes")


def _as_operand(array: Any) -> Operand:
    return array if isinstance(array, Slot | Constant | Literal) else _whole(array)


def _whole(array: Any) -> Constant:
    return Constant(array, array, positions(array.shape))


def _empty(aval: Any) -> Constant:
    return _whole(jnp.zeros(aval.shape, aval.dtype))


def _literal(literal: Any) -> Operand:
    if np.ndim(literal.val):
        return _whole(jnp.asarray(literal.val))
    return Literal(np.asarray(literal.val, getattr(literal.aval, "dtype", None)))


def _is_fill(eqn: Any, ins: Sequence[Operand]) -> bool:
    """Whether an equation fills an array with a literal, which need not be stored."""
    return eqn.primitive.name == "broadcast_in_dim" and all(isinstance(i, Literal) for i in ins)


def _evaluated(eqn: Any, ins: Sequence[Constant | Literal]) -> list[Operand]:
    arrays = [jnp.asarray(i.value) if isinstance(i, Literal) else i.array for i in ins]
    outs = evaluate_alone(eqn, arrays)
    move = MOVES.get(eqn.primitive.name)
    if move is None or len(ins) > 1 or not isinstance(ins[0], Constant):
        return [_whole(out) for out in outs]
    constant, moved = ins[0], []
    for out, index in zip(outs, move(eqn), strict=True):
        index = np.asarray(constant.positions.reshape(-1)[index])
        # A kernel reads evenly spaced elements. A repeated or regrouped weight is copied.
        spaced = steps_of(index) is not None
        moved.append(Constant(out, constant.base, index) if spaced else _whole(out))
    return moved


def steps_of(index: np.ndarray) -> tuple[int, ...] | None:
    """The distance of neighbours along each axis, or `None` if the positions are not evenly
    spaced."""
    first = index[(0,) * index.ndim]
    steps, spaced = [], np.full((), first)
    for axis, size in enumerate(index.shape):
        at = tuple(int(size > 1 and i == axis) for i in range(index.ndim))
        steps.append(int(index[at] - first))
        spaced = np.add.outer(spaced, steps[-1] * np.arange(size))
    return tuple(steps) if np.array_equal(index, spaced) else None


def _needed(operations: Sequence[Operation], results: Sequence[Operand]) -> list[Operation]:
    """The operations that results depend on."""
    needed = {r for r in results if isinstance(r, Slot)}
    selected = []
    for op in reversed(operations):
        if needed.intersection(op.outs):
            needed.update(i for i in op.ins if isinstance(i, Slot))
            selected.append(op)
    return selected[::-1]
