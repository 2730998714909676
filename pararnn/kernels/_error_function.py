r"""The error function, which Pallas' Triton backend lacks (JAX 0.10.2).

$\mathrm{erf}(x) = x\,p(x^2)$ near 0, and $\mathrm{erfc}(x) = e^{-x^2} q(t)$ beyond, with
$t = (x-k)/(x+k)$, which maps all positive numbers to $(-1, 1)$. The polynomials interpolate SciPy's
values in Chebyshev's points.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import chebyshev, polynomial
from scipy import special

_MIDDLE = 2.0  # k
_NEAR = 1.0


@functools.cache
def _near(degree: int) -> np.ndarray:
    """The coefficients of $p$ in powers of $x^2$, for $|x|$ up to `_NEAR`."""

    def ratio(u):
        square = np.maximum((u + 1) / 2 * _NEAR**2, 1e-30)
        return special.erf(np.sqrt(square)) / np.sqrt(square)

    fit = chebyshev.cheb2poly(chebyshev.chebinterpolate(ratio, degree))
    shifted = np.zeros(1)
    for c in fit[::-1]:  # in u = 2 x² / _NEAR² - 1
        shifted = polynomial.polyadd(polynomial.polymul(shifted, [-1, 2 / _NEAR**2]), [c])
    return shifted


@functools.cache
def _far(degree: int) -> np.ndarray:
    """The coefficients of $q$ in Chebyshev polynomials."""

    def scaled(t):
        x = _MIDDLE * (1 + t) / np.maximum(1 - t, 1e-12)
        return special.erfcx(x) * (1 + 2 * x)

    return chebyshev.chebinterpolate(scaled, degree)


def _polynomial(coefficients, x):
    total = lax.full(x.shape, float(coefficients[-1]), x.dtype)
    for c in coefficients[-2::-1]:
        total = total * x + lax.full(x.shape, float(c), x.dtype)
    return total


def _clenshaw(coefficients, x):
    after = following = lax.full(x.shape, 0, x.dtype)
    for c in coefficients[:0:-1]:
        after, following = 2 * x * after - following + float(c), after
    return x * after - following + float(coefficients[0])


def _parts(x: Any) -> tuple[Any, Any]:
    """`erf(x)`, valid for small `x`; and `erfc(abs(x))`, valid for large `x`."""
    double = x.dtype == np.float64
    near = x * _polynomial(_near(16 if double else 7), x * x)
    size = lax.abs(x)
    t = (size - _MIDDLE) / (size + _MIDDLE)
    # exp would magnify the rounding of x²: it is exp(-h²) exp((h - x)(h + x)), with h² exact.
    high = (size * 2.0**5 + 0.5).astype(np.int32).astype(x.dtype) * 2.0**-5
    square = lax.exp(-high * high) * lax.exp((high - size) * (high + size))
    scaled = _clenshaw(_far(30 if double else 11), t)
    far = square * scaled / (1 + 2 * size)
    return near, jnp.where(size > 28, 0, far)


def erf(x: Any) -> Any:
    near, far = _parts(x)
    beyond = jnp.where(x > 0, 1 - far, far - 1)
    return jnp.where(x != x, x, jnp.where(lax.abs(x) < _NEAR, near, beyond))


def erfc(x: Any) -> Any:
    near, far = _parts(x)
    beyond = jnp.where(x > 0, far, 2 - far)
    return jnp.where(x != x, x, jnp.where(lax.abs(x) < _NEAR, 1 - near, beyond))
