"""Users' rules: what replaces a primitive for which kernels have no code."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..jaxprs._registry import check_rule
from ..jaxprs._walk import ENTERED, equations, evaluate, evaluate_alone, open_jaxpr
from . import _complex, _elementwise, _rules

_SUPPORTED = _elementwise.NAMES | _rules.RULES.keys() | _complex.RULES.keys()
_registered: dict[str, Callable[..., Any]] = {}


def register_rule(primitive: jex_core.Primitive | str, rule: Callable[..., Any]) -> None:
    """Makes a primitive available in generated kernels, by a function that computes the same with
    operations that kernels have.

    A step that uses a primitive without a rule runs without a kernel;
    [`pararnn.kernels.unsupported`][] names the primitive. The rule replaces the primitive only
    inside kernels. Tangents go through the derivative rule of your primitive
    (`jax.interpreters.ad`): register the primitives that it binds as well.

    ```python
    swish = jax.extend.core.Primitive("my_swish")
    ...
    pararnn.kernels.register_rule(swish, lambda h, *, beta: h * jax.nn.sigmoid(beta * h))
    ```

    **Arguments:**

    - `primitive`: the primitive (`jax.extend.core.Primitive`) or its name. It may be one of JAX's.
    - `rule`: `rule(*operands, **params) -> result`, or a sequence of results if the primitive has
        several (`multiple_results`), of the same shapes and dtypes as the primitive's. It is traced
        with the operands of an equation and the equation's parameters. It may use elementwise
        operations, products, reductions over axes, and whatever moves elements to places that
        shapes tell, and other primitives that have a rule.

    **Raises:**

    `TypeError` for arguments of another type, `ValueError` for a primitive that kernels support
    already or that has a rule. When a step is traced, `ValueError` if the results have other shapes
    or dtypes than the primitive's.
    """
    name = check_rule(primitive, rule, "rule(*operands, **params)")
    if name in _SUPPORTED or name in ENTERED or name in _registered:
        raise ValueError(
            f"`primitive`: kernels support `{name}` already. Rules are looked up by the "
            "primitive's name: if this is another primitive, rename it."
        )
    _registered[name] = rule


def expand(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` with each primitive that has a rule replaced by what the rule computes."""
    if not _registered:
        return step

    def expanded(carry: PyTree[Any], x: PyTree[Any]) -> PyTree[Any]:
        closed, shape = jax.make_jaxpr(step, return_shape=True)(carry, x)
        if not any(eqn.primitive.name in _registered for eqn in equations(closed)):
            return step(carry, x)  # a rule must not change the kernels of other steps
        outs = evaluate(*open_jaxpr(closed), jtu.tree_leaves((carry, x)), _replace)
        return jtu.tree_unflatten(jtu.tree_structure(shape), outs)

    return expanded


def _replace(eqn: Any, ins: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name not in _registered:
        return list(evaluate_alone(eqn, ins))
    try:
        closed, results = jax.make_jaxpr(
            lambda *ins: _registered[name](*ins, **eqn.params), return_shape=True
        )(*ins)
    except Exception as error:
        error.add_note(f"The kernel rule registered for the primitive `{name}` failed.")
        raise
    got = [(x.shape, x.dtype) for x in jtu.tree_leaves(results)]
    expected = [(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    if got != expected:
        raise ValueError(
            f"The kernel rule registered for the primitive `{name}` must return results of shapes "
            f"and dtypes {expected}; got {got}."
        )
    return evaluate(*open_jaxpr(closed), ins, _replace)
