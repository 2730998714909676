"""Elementwise primitives, in terms of the operations that Triton has."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ._error_function import erf, erfc
from ._program import Unsupported

# Operations that it has for float32 and float64; it lacks some for narrower numbers.
_NATIVE = (
    "abs ceil floor exp exp2 expm1 log log1p sqrt cbrt rsqrt sin cos tan asin acos atan atan2 "
    "sinh cosh tanh asinh acosh atanh add sub mul eq ne gt ge lt le and or xor not "
    "convert_element_type log2 one_minus_square"
).split()


def _plain(eqn):
    primitive, params = eqn.primitive, eqn.params
    return lambda *xs: primitive.bind(*xs, **params)


def _like(x, value):
    return lax.full(x.shape, value, x.dtype)


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _negated(x):
    """By multiplication: subtracting from zero would lose the sign of zero."""
    return x * _like(x, -1) if _is_floating(x) else lax.neg(x)


def _extreme(function, of_booleans):
    """NaN if either operand is NaN, as in XLA; a GPU's instruction returns the other operand."""

    def extreme(x, y):
        if x.dtype == np.bool_:
            return of_booleans(x, y)
        if not _is_floating(x):
            return function(x, y)
        return jnp.where(x != x, x, jnp.where(y != y, y, function(x, y)))

    return extreme


maximum = _extreme(lax.max, lax.bitwise_or)
minimum = _extreme(lax.min, lax.bitwise_and)


def _guarded(guarded, needs_no_guard):
    """An integer operation with the results that XLA defines where the processor's are undefined;
    the plain operation if the second operand is a literal that needs no guard."""

    def of(eqn):
        dtype, literal = eqn.outvars[0].aval.dtype, getattr(eqn.invars[1], "val", None)
        if jnp.issubdtype(dtype, jnp.floating):
            return _plain(eqn)
        usual = literal is not None and np.ndim(literal) == 0 and needs_no_guard(literal, dtype)
        return _plain(eqn) if usual else guarded

    return of


def _divided(x, y):
    """x / 0 has all bits set; the least integer / -1 is itself, as in XLA."""
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.where(y == 0, ~_like(x, 0), lax.div(x, jnp.where(y == 0, _like(y, 1), y)))
    simple = (y == 0) | (y == -1)
    quotient = lax.div(x, jnp.where(simple, _like(y, 1), y))
    return jnp.where(y == 0, _like(x, -1), jnp.where(simple, -x, quotient))


def _remainder(x, y):
    simple = y == 0
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        simple |= y == -1
    rest = lax.rem(x, jnp.where(simple, _like(y, 1), y))
    return jnp.where(y == 0, x, rest)


def _shifted(shift, beyond):
    """A shift whose result is `beyond` for a negative number of bits, or more than there are."""

    def shifted(x, bits):
        size = jnp.iinfo(x.dtype).bits
        inside = (bits >= 0) & (bits < size)
        return jnp.where(inside, shift(x, jnp.where(inside, bits, 0)), beyond(x, size))

    return _guarded(shifted, lambda bits, dtype: 0 <= bits < jnp.iinfo(dtype).bits)


def _none_left(x, size):
    return _like(x, 0)


def _sign_left(x, size):
    return lax.shift_right_arithmetic(x, _like(x, size - 1))


def _selected(which, *cases):
    if which.dtype == np.bool_:
        return lax.select_n(which, *cases)
    found = cases[-1]
    for k in reversed(range(len(cases) - 1)):
        found = jnp.where(which <= k, cases[k], found)
    return found


def _power(eqn):
    """JAX allows integer exponents: they are converted to the dtype of the result."""
    dtype = eqn.outvars[0].aval.dtype
    return lambda x, y: lax.pow(x, y.astype(dtype).astype(x.dtype))


def _population_count(x):
    if x.dtype != np.int64:
        return lax.population_count(x)
    low, high = x.astype(np.int32), (x >> 32).astype(np.int32)
    return (lax.population_count(low) + lax.population_count(high)).astype(np.int64)


def _next_after(eqn):
    dtype = eqn.outvars[0].aval.dtype
    if is_narrow(dtype):
        raise Unsupported(f"uses `nextafter` of {dtype}")
    return _plain(eqn)


def _integer_pow(eqn):
    exponent = eqn.params["y"]

    def power(x):
        one = _like(x, 1)
        result, square, left = one, x, abs(exponent)
        while left:
            if left % 2:
                result = square if result is one else result * square
            left //= 2
            square = square * square if left else square
        return one / result if exponent < 0 else result

    return power


def _logistic(x):
    one = _like(x, 1)
    return one / (one + lax.exp(-x))


def _sign(x):
    """The sign of either zero, and of NaN, is the operand itself."""
    one = _like(x, 1)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.where(x == 0, x, one)
    return jnp.where(x > 0, one, jnp.where(x < 0, _like(x, -1), x))


def _round(eqn):
    to_even = eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN

    def rounded(x):
        size = lax.abs(x)  # its fractional part is exact
        below = lax.floor(size)
        rest, half = size - below, _like(x, 0.5)
        odd = below - 2 * lax.floor(below * half) != 0
        up = (rest > half) | ((rest == half) & odd if to_even else rest == half)
        whole = jnp.where(up, below + _like(x, 1), below)
        # Zero has the sign of the number that is rounded.
        return jnp.where(whole == 0, x * _like(x, 0), jnp.where(x < 0, -whole, whole))

    return rounded


def _is_finite(x):
    return x - x == _like(x, 0)


def _same(x):
    return x


_WRITTEN: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "max": lambda eqn: maximum,
    "min": lambda eqn: minimum,
    "clamp": lambda eqn: lambda low, x, high: minimum(maximum(low, x), high),
    "add_any": lambda eqn: lax.add,
    "neg": lambda eqn: _negated,
    "div": _guarded(_divided, lambda y, dtype: y > 0),
    "rem": _guarded(_remainder, lambda y, dtype: y > 0),
    "shift_left": _shifted(lax.shift_left, _none_left),
    "shift_right_logical": _shifted(lax.shift_right_logical, _none_left),
    "shift_right_arithmetic": _shifted(lax.shift_right_arithmetic, _sign_left),
    "select_n": lambda eqn: _selected,
    "pow": _power,
    "population_count": lambda eqn: _population_count,
    "nextafter": _next_after,
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
# Narrow numbers need no conversion to float32: nothing is computed.
_COMPARING = frozenset("select_n convert_element_type abs eq ne gt ge lt le".split())


def elementwise(eqn: Any) -> Callable[..., Any]:
    """The function of an equation; for narrower numbers in float32, then rounded, as by XLA."""
    name = eqn.primitive.name
    function = _WRITTEN[name](eqn) if name in _WRITTEN else _plain(eqn)
    if name in _COMPARING:
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
