"""Functions of single elements as kernels have them, against XLA's, where these are delicate: signs
of zeros, ties, what is not finite, and what processors leave undefined for integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pararnn.jaxprs._walk import evaluate, evaluate_alone, open_jaxpr
from pararnn.kernels._elementwise import elementwise

REAL = [0.0, 0.3, 0.4, 0.5, 1.0, 1.5, 2.0, 2.5, 3.7, 1e4, np.inf]
REAL = np.asarray([*REAL, *(-x for x in REAL), np.nan, 0.5 - 2**-25])
WHOLE = np.asarray([0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 100, 127])

EXACT = [lax.neg, lax.abs, lax.sign, lax.floor, lax.ceil, lax.square, lax.is_finite]
EXACT += [lambda x, to=to: lax.round(x, to) for to in lax.RoundingMethod]
EXACT_OF_PAIRS = [lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min, lax.nextafter]
EXACT_OF_PAIRS += [lax.eq, lax.ne, lax.lt, lax.ge, lambda x, y: lax.clamp(-y, x, y)]
ROUNDED = [lax.logistic, lax.erf, lax.erfc, lax.tanh, lax.exp, lambda x: lax.integer_pow(x, 3)]
ROUNDED += [lambda x: lax.integer_pow(x, -2), lambda x: lax.pow(x, jnp.full(x.shape, 3, np.int64))]
OF_INTEGERS = [lax.sign, lax.bitwise_not, lax.population_count]
OF_PAIRS = [lax.div, lax.rem, lax.max, lax.min, lax.add, lax.sub, lax.mul, lax.bitwise_xor]
OF_PAIRS += [lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical]
OF_PAIRS += [lambda x, y: lax.select_n((x % 5).astype(np.int32) - 1, x, y, x ^ y)]
OF_PAIRS += [lambda x, y, n=n: (x << n) + (y >> n) + x // (n + 1) for n in (3, 7, 40)]


def ours(function, *xs):
    """The function, each of its equations as in a kernel."""
    jaxpr, consts = open_jaxpr(jax.make_jaxpr(function)(*xs))

    def rule(eqn, ins):
        if eqn.primitive.name == "broadcast_in_dim":
            return evaluate_alone(eqn, ins)
        return [elementwise(eqn)(*jnp.broadcast_arrays(*ins))]

    (out,) = evaluate(jaxpr, consts, xs, rule)
    return out


def pairs(x):
    return tuple(jnp.asarray(side.reshape(-1)) for side in np.meshgrid(x, x))


def cases(dtype, functions, args):
    for function in functions:
        got, expected = ours(function, *args), function(*args)
        assert got.dtype == expected.dtype
        wide = np.float64 if jnp.issubdtype(dtype, jnp.floating) else dtype
        yield np.asarray(got, wide), np.asarray(expected, wide)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_real_functions(dtype):
    x = REAL.astype(dtype)
    narrow = jnp.finfo(dtype).bits < 32
    of_pairs = [f for f in EXACT_OF_PAIRS if f is not lax.nextafter or not narrow]
    for functions, args in ((EXACT, (jnp.asarray(x),)), (of_pairs, pairs(x))):
        for got, expected in cases(dtype, functions, args):
            np.testing.assert_array_equal(got, expected)
            signs = np.signbit(got) == np.signbit(expected)
            assert (signs | np.isnan(expected)).all()
    eps = float(jnp.finfo(dtype).eps)
    for got, expected in cases(dtype, ROUNDED, (jnp.asarray(x),)):
        np.testing.assert_allclose(got, expected, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint32])
def test_integer_functions(dtype):
    least = np.iinfo(dtype).min
    x = np.asarray([*WHOLE, *(-x for x in WHOLE if least < 0), least, np.iinfo(dtype).max], dtype)
    for functions, args in ((OF_INTEGERS, (jnp.asarray(x),)), (OF_PAIRS, pairs(x))):
        for got, expected in cases(dtype, functions, args):
            np.testing.assert_array_equal(got, expected)


def test_zeros_have_signs():
    """By what they are, without XLA."""
    x = jnp.asarray([-0.4, -0.0, 0.0, 0.4], np.float32)
    minus = [True, True, False, False]
    for function in (jnp.round, lax.sign, jnp.ceil, lambda x: lax.neg(lax.neg(x))):
        np.testing.assert_array_equal(np.signbit(ours(function, x)), minus)
    np.testing.assert_array_equal(np.signbit(ours(lax.neg, x)), np.logical_not(minus))
