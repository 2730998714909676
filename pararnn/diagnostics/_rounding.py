"""Monte Carlo arithmetic: evaluation with random roundings (Parker, 1997).

A function is evaluated primitive by primitive, and each rounded result gets another rounding, at
random. The spread of such evaluations is the error that rounding alone explains.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Integer

from ..jaxprs._primitives import primitive
from ..jaxprs._walk import evaluate, evaluate_alone

# An integer that these return was not rounded, as a rule: counters and flags stay as they are. That
# a gate is exactly 1, however, is rounding.
_KEEPING_INTEGERS = frozenset(
    "add add_any cond convert_element_type cumprod cumsum div dot_general integer_pow mul "
    "reduce_prod reduce_sum scan scatter-add square sub while".split()
)


def rounded_anew(function: Callable[..., Any], salt: Integer[Array, ""]) -> Callable[..., Any]:
    """`function`, with each of its roundings off by up to an ulp more, at random.

    Zeros stay zero, and what is at most 1 in magnitude stays so: a gate never leaves its range.

    **Arguments:**

    - `function`: from pytrees of arrays to a pytree of arrays.
    - `salt`: an unsigned 32-bit integer, which may be traced: another one gives other roundings.
    """

    def run(*args):
        state = [salt]  # which each rounding replaces

        def rule(eqn, ins):
            outs = evaluate_alone(eqn, ins)
            name = eqn.primitive.name
            return outs if primitive(name).exact else [_round(x, name, state) for x in outs]

        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        results = evaluate(closed.jaxpr, closed.consts, jtu.tree_leaves(args), rule)
        return jtu.tree_unflatten(jtu.tree_structure(out), results)

    return run


def _round(x: Any, name: str, salt: list[Any]) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):  # parts are rounded as the whole is large
        return x + jax.lax.complex(*(_noise(jnp.abs(x), salt) for _ in range(2)))
    y = x + _noise(x, salt)
    y = jnp.where(jnp.abs(x) <= 1, jnp.clip(y, -1, 1), y)
    return jnp.where(x == jnp.round(x), x, y) if name in _KEEPING_INTEGERS else y


def _noise(x: Any, salt: list[Any]) -> Any:
    """Uniform in `x * [-eps, eps]`."""
    salt[0] = _hash(salt[0])
    bits = _hash(jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) ^ salt[0])
    signed = jax.lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32)
    return x * (signed * (float(jnp.finfo(x.dtype).eps) / 2**31)).astype(x.dtype)


def _hash(bits: Any) -> Any:
    """The finaliser of MurmurHash3: cheaper, and quicker to compile, than a random key."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return bits ^ (bits >> jnp.uint32(16))
