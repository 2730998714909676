"""Functions of single elements, written with what the compilers of kernels know."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ._error_function import erf, erfc

# What they know, for float32 and float64. (They lack some for narrower numbers.)
_NATIVE = (
    "abs neg ceil floor exp exp2 expm1 log log1p sqrt pow cbrt rsqrt sin cos tan asin acos atan "
    "atan2 sinh cosh tanh asinh acosh atanh add sub mul div rem eq ne gt ge lt le and or xor "
    "shift_left shift_right_arithmetic shift_right_logical not select_n convert_element_type "
    "population_count nextafter log2 one_minus_square"
).split()


def _plain(eqn):
    primitive, params = eqn.primitive, eqn.params
    return lambda *xs: primitive.bind(*xs, **params)


def _maximum(x, y):
    """As XLA's: not a number if either is not. A GPU's own would be the other one."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.max(x, y)
    return jnp.where((x > y) | (x != x), x, y)


def _minimum(x, y):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.min(x, y)
    return jnp.where((x < y) | (x != x), x, y)


def _integer_pow(eqn):
    exponent = eqn.params["y"]

    def power(x):
        one = lax.full(x.shape, 1, x.dtype)
        result, square, left = one, x, abs(exponent)
        while left:
            if left % 2:
                result = square if result is one else result * square
            left //= 2
            square = square * square if left else square
        return one / result if exponent < 0 else result

    return power


def _logistic(x):
    one = lax.full(x.shape, 1, x.dtype)
    return one / (one + lax.exp(-x))


def _sign(x):
    zero, one = lax.full(x.shape, 0, x.dtype), lax.full(x.shape, 1, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.where(x == zero, zero, one)
    sign = jnp.where(x > zero, one, jnp.where(x < zero, -one, zero))
    return jnp.where(x != x, x, sign) if jnp.issubdtype(x.dtype, jnp.floating) else sign


def _round(eqn):
    to_even = eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN

    def rounded(x):
        below = lax.floor(x)
        rest = x - below
        half = lax.full(x.shape, 0.5, x.dtype)
        up = below + lax.full(x.shape, 1, x.dtype)
        odd = below - 2 * lax.floor(below * half) != 0
        tie = odd if to_even else x > 0
        return jnp.where((rest > half) | ((rest == half) & tie), up, below)

    return rounded


def _is_finite(x):
    return x - x == lax.full(x.shape, 0, x.dtype)


def _same(x):
    return x


_WRITTEN: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "max": lambda eqn: _maximum,
    "min": lambda eqn: _minimum,
    "clamp": lambda eqn: lambda low, x, high: _minimum(_maximum(low, x), high),
    "add_any": lambda eqn: lax.add,
    "square": lambda eqn: lambda x: x * x,
    "integer_pow": _integer_pow,
    "logistic": lambda eqn: _logistic,
    "sign": lambda eqn: _sign,
    "round": _round,
    "is_finite": lambda eqn: _is_finite,
    "erf": lambda eqn: erf,
    "erfc": lambda eqn: erfc,
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "pvary", "reshard"), lambda eqn: _same),
}
NAMES = frozenset(_NATIVE) | frozenset(_WRITTEN)
_EXACT = frozenset("select_n convert_element_type neg abs eq ne gt ge lt le".split())


def elementwise(eqn: Any) -> Callable[..., Any]:
    """The function of an equation; in float32 and back for narrower numbers, as XLA computes."""
    name = eqn.primitive.name
    function = _WRITTEN[name](eqn) if name in _WRITTEN else _plain(eqn)
    if name in _EXACT:
        return function

    def wide(*xs):
        dtype = next((x.dtype for x in xs if is_narrow(x.dtype)), None)
        if dtype is None:
            return function(*xs)
        out = function(*(widened(x) for x in xs))
        return out.astype(dtype) if out.dtype == np.float32 else out

    return wide


def is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def widened(x: Any) -> Any:
    return x.astype(np.float32) if is_narrow(x.dtype) else x
