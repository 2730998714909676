r"""Diagonal systems in continuous time, $\dot h = Λ h + u$ with $Λ = -e^ν + iω$, discretised
exactly for inputs that are held constant over a step of time $Δ$ (zero-order hold)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._parts import at_least_float32, log_uniform


def init_rates(
    shape: tuple[int, ...], dtype: Any
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""$ν$ and $ω$ of $Λ_n = -\tfrac12 + iπn$, with $n$ along the last axis."""
    omega = jnp.broadcast_to(math.pi * jnp.arange(float(shape[-1])), shape)
    return jnp.full(shape, math.log(0.5), dtype), omega.astype(dtype)


def init_log_step(key: PRNGKeyArray, size: int, dtype: Any) -> Float[Array, " size"]:
    r"""$\log Δ$ with $Δ$ log-uniform in $(10^{-3}, 10^{-1})$."""
    return jnp.log(log_uniform(key, (size,), 1e-3, 0.1)).astype(dtype)


def complex_zero_state(shape: tuple[int, ...], like: Array) -> Complex[Array, "..."]:
    """A complex zero state, complex64 unless `like` is float64."""
    zero = jnp.zeros(shape, at_least_float32(like).dtype)
    return jax.lax.complex(zero, zero)


def _exponent(nu, omega, log_step):
    """The real and the imaginary part of $ΛΔ$."""
    step = jnp.exp(at_least_float32(log_step))
    return -jnp.exp(at_least_float32(nu)) * step, at_least_float32(omega) * step


def multiplier(nu: Array, omega: Array, log_step: Array) -> Complex[Array, "..."]:
    r"""$\bar Λ = e^{ΛΔ}$."""
    real, imag = _exponent(nu, omega, log_step)
    radius = jnp.exp(real)
    return jax.lax.complex(radius * jnp.cos(imag), radius * jnp.sin(imag))


def gain(nu: Array, omega: Array, log_step: Array) -> Complex[Array, "..."]:
    r"""$Λ^{-1} (\bar Λ - 1)$, without cancellation where $ΛΔ$ is small:
    $\mathrm{Re}(e^{a+ib} - 1) = (e^a - 1) \cos b - 2 \sin^2(b/2)$."""
    real, imag = _exponent(nu, omega, log_step)
    above_one = jax.lax.complex(
        jnp.expm1(real) * jnp.cos(imag) - 2 * jnp.sin(imag / 2) ** 2,
        jnp.exp(real) * jnp.sin(imag),
    )
    decay, omega = jnp.exp(at_least_float32(nu)), at_least_float32(omega)
    # 1/Λ = conj(Λ)/|Λ|², as generated kernels do not divide complex numbers.
    square = decay**2 + omega**2
    return above_one * jax.lax.complex(-decay / square, -omega / square)
