"""A step's tangents without those that mix state elements."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._registry import combines_elements
from ._walk import (
    ENTERED,
    called,
    equations,
    evaluate_alone,
    inner_jaxprs,
    open_jaxpr,
    scan_parts,
    walk,
)


def elementwise_tangents(step: Callable[..., PyTree[Any]]) -> Callable[..., PyTree[Any]]:
    """The step, whose tangents of the state pass through elementwise operations and moves only.

    Its values are those of the step. What combines several elements of the state, such as a matrix
    product, a reduction, or a loop around one, counts as a constant when it is differentiated: for
    a gated cell, $h' = n + z (h - n)$, the gates remain.
    """

    def run(state, x):
        return _evaluated(step, state, x)[0]

    return run


def passes_tangents(
    step: Callable[..., PyTree[Any]], state: PyTree[Any], x: PyTree[Any]
) -> tuple[bool, bool]:
    """`(any, all)`: whether any tangent of the state remains in `elementwise_tangents(step)`, and
    whether none is lost."""
    found = []

    def run(state, x):
        out, *flags = _evaluated(step, state, x)
        found.append(tuple(flags))
        return out

    jax.eval_shape(run, state, x)
    return found[0]


class _Value(NamedTuple):
    """An array, and whether it has a tangent."""

    array: Any
    varies: bool


def _evaluated(step, state, x) -> tuple[PyTree[Any], bool, bool]:
    """The new state, whether any of it has a tangent, and whether no tangent was dropped."""
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(state, x)
    states, inputs = jtu.tree_leaves(state), jtu.tree_leaves(x)
    values = [*(_Value(s, True) for s in states), *(_Value(i, False) for i in inputs)]
    dropped: list[jex_core.JaxprEqn] = []

    def rule(eqn, ins):
        arrays, varies = [v.array for v in ins], any(v.varies for v in ins)
        if varies and _mixes(eqn, ins):
            call = called(eqn)
            if call is not None:
                return evaluate(*open_jaxpr(call.jaxpr), call.args(ins))
            dropped.append(eqn)
            arrays, varies = map(jax.lax.stop_gradient, arrays), False
        return [_Value(out, varies) for out in evaluate_alone(eqn, list(arrays))]

    def evaluate(jaxpr, consts, args):
        constants = [_Value(c, False) for c in consts]
        return walk(jaxpr, args, rule, literal=lambda a: _Value(a.val, False), consts=constants)

    outs = evaluate(*open_jaxpr(closed), values)
    new = jtu.tree_unflatten(jtu.tree_structure(shapes), [v.array for v in outs])
    return new, any(v.varies for v in outs), not dropped


def _mixes(eqn: jex_core.JaxprEqn, ins: list[_Value]) -> bool:
    """Whether the equation, or any inside it, combines several elements of an operand."""
    if eqn.primitive.name not in ENTERED:
        return combines_elements(eqn)
    if eqn.primitive.name == "scan":  # a carry collects from all slices
        whole = sum(scan_parts(eqn))
        if scan_parts(eqn)[1] and any(v.varies for v in ins[whole:]):
            return True
    inner = [e for jaxpr in inner_jaxprs(eqn) for e in equations(jaxpr)]
    return any(combines_elements(e) for e in inner if e.primitive.name not in ENTERED)
