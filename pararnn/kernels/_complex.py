"""Complex steps rewritten in real and imaginary parts: kernels have real numbers only."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree

from .._misc import is_complex
from ..jaxprs._primitives import primitive
from ..jaxprs._walk import called, evaluate_alone, open_jaxpr, walk
from ._program import Unsupported


class Parts(NamedTuple):
    """The real and imaginary parts of a complex array."""

    real: Any
    imag: Any


def as_parts(tree: PyTree[Any]) -> PyTree[Any]:
    """Replaces complex leaves, arrays or `jax.ShapeDtypeStruct`, by their `Parts`."""

    def one(x):
        if not is_complex(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            half = jax.ShapeDtypeStruct(x.shape, jnp.finfo(x.dtype).dtype)
            return Parts(half, half)
        return Parts(lax.real(x), lax.imag(x))

    return jtu.tree_map(one, tree)


def as_numbers(tree: PyTree[Any]) -> PyTree[Any]:
    """The inverse of `as_parts`."""

    def one(x):
        return lax.complex(*x) if isinstance(x, Parts) else x

    return jtu.tree_map(one, tree, is_leaf=lambda x: isinstance(x, Parts))


def of_parts(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step from `Parts` to `Parts`, which computes with real numbers only."""

    def real_step(carry, x):
        args = jax.eval_shape(as_numbers, (carry, x))
        closed, shape = jax.make_jaxpr(step, return_shape=True)(*args)
        jaxpr, consts = open_jaxpr(closed)
        flat = jtu.tree_leaves((carry, x), is_leaf=lambda x: isinstance(x, Parts))
        outs = walk(jaxpr, flat, _rule, literal=_literal, consts=as_parts(list(consts)))
        return jtu.tree_unflatten(jtu.tree_structure(shape), outs)

    return real_step


def _literal(literal: Any) -> Any:
    return as_parts(jnp.asarray(literal.val, getattr(literal.aval, "dtype", None)))


def _rule(eqn: Any, ins: list[Any]) -> Sequence[Any]:
    call = called(eqn)
    if call is not None:
        jaxpr, consts = open_jaxpr(call.jaxpr)
        consts = as_parts(list(consts))
        return walk(jaxpr, call.args(ins), _rule, literal=_literal, consts=consts)
    if not any(is_complex(v.aval) for v in (*eqn.invars, *eqn.outvars)):
        return evaluate_alone(eqn, ins)
    name = eqn.primitive.name
    if primitive(name).linear:
        return _by_parts(eqn, ins)
    if name not in RULES:
        raise Unsupported(f"uses `{name}` of complex numbers")
    return [RULES[name](eqn, *ins)]


def _by_parts(eqn: Any, ins: list[Any]) -> list[Any]:
    """Applies a real-linear primitive to the real and to the imaginary parts."""
    sides = [[x[i] if isinstance(x, Parts) else x for x in ins] for i in range(2)]
    outs = [eqn.primitive.bind(*side, **eqn.params) for side in sides]
    if eqn.primitive.multiple_results:
        return [Parts(*parts) for parts in zip(*outs, strict=True)]
    return [Parts(*outs)]


def _times(product: Callable[..., Any], a: Any, b: Any) -> Parts:
    real = product(a.real, b.real) - product(a.imag, b.imag)
    return Parts(real, product(a.real, b.imag) + product(a.imag, b.real))


def _dot_general(eqn, a, b):
    dtype = jnp.finfo(eqn.outvars[0].aval.dtype).dtype
    params = {**eqn.params, "preferred_element_type": dtype}
    return _times(lambda x, y: eqn.primitive.bind(x, y, **params), a, b)


def _convert(eqn, x):
    dtype = jnp.finfo(eqn.outvars[0].aval.dtype).dtype
    real, imag = x if isinstance(x, Parts) else (x, jnp.zeros_like(x))
    return Parts(lax.convert_element_type(real, dtype), lax.convert_element_type(imag, dtype))


def _exp(eqn, x):
    size = lax.exp(x.real)
    return Parts(size * lax.cos(x.imag), size * lax.sin(x.imag))


RULES: dict[str, Callable[..., Any]] = {
    "real": lambda eqn, x: x.real,
    "imag": lambda eqn, x: x.imag,
    "complex": lambda eqn, real, imag: Parts(real, imag),
    "conj": lambda eqn, x: Parts(x.real, -x.imag) if isinstance(x, Parts) else _convert(eqn, x),
    "mul": lambda eqn, a, b: _times(lax.mul, a, b),
    "square": lambda eqn, x: _times(lax.mul, x, x),
    "dot_general": _dot_general,
    "convert_element_type": _convert,
    "exp": _exp,
}
