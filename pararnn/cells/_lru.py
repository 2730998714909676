import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._base import check_inputs, check_sizes
from ._parts import at_least_float32, normal
from ._vector import AbstractVectorCell
from ._zero_order_hold import complex_zero_state


class LRU(AbstractVectorCell):
    r"""The linear recurrent unit (Orvieto et al., *Resurrecting recurrent neural networks for long
    sequences*, ICML 2023), complex and diagonal:

    $$h_t = λ ⊙ h_{t-1} + γ ⊙ (B x_t), \quad y_t = \mathrm{Re}(C h_t) + D x_t, \qquad
    λ = \exp(-e^ν + i e^θ).$$

    $D$ is a full matrix, as outputs may be more than inputs; in NicolasZucchet/minimal-LRU it is
    diagonal. This parametrisation keeps $|λ| < 1$ whatever the parameters. The step is affine in
    the state, so one pass solves it exactly. The Jacobian consists of 2×2 blocks, the real and the
    imaginary part of each unit. The state has shape `(hidden_size,)` and is complex, complex64
    unless the parameters are float64; the output is real, shape `(output_size,)`. Complex matrices
    are stored as real and imaginary part along a leading axis.
    """

    weight_x: Float[Array, "2 hidden_size input_size"]
    weight_o: Float[Array, "2 output_size hidden_size"]
    skip: Float[Array, "output_size input_size"]
    nu: Float[Array, " hidden_size"]
    theta: Float[Array, " hidden_size"]
    gamma_log: Float[Array, " hidden_size"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and of (complex) states.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `r_min`, `r_max`, `max_phase`: $λ$ starts uniformly distributed over the sector
            $r_{\min} \le |λ| \le r_{\max}$, $0 \le \arg λ \le$ `max_phase` of the unit disc. Long
            memory needs `r_min` near 1, and then a small `max_phase`.
        - `dtype`: of the parameters, which are real.
        - `key`: for the parameters: $B \sim N(0, 1/(2\,\text{input\_size}))$ and
            $C \sim N(0, 1/\text{hidden\_size})$ in both parts, $D \sim N(0, 1/\text{input\_size})$,
            and $γ = \sqrt{1-|λ|^2}$.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(
                "`r_min` and `r_max` must satisfy 0 <= r_min < r_max <= 1; "
                f"got {r_min} and {r_max}."
            )
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"`max_phase` must be in (0, 2 pi]; got {max_phase}.")
        key_x, key_o, key_d, key_r, key_p = jax.random.split(key, 5)
        scale = (2 * input_size) ** -0.5
        self.weight_x = normal(key_x, (2, hidden_size, input_size), scale, dtype)
        self.weight_o = normal(key_o, (2, output_size, hidden_size), hidden_size**-0.5, dtype)
        self.skip = normal(key_d, (output_size, input_size), input_size**-0.5, dtype)
        # A sample may be the left end of its interval, of which the logarithm is not finite at 0.
        tiny = 1e-6
        radius2 = jax.random.uniform(
            key_r, (hidden_size,), minval=max(r_min**2, tiny), maxval=min(r_max**2, 1 - tiny)
        )
        phase = jax.random.uniform(key_p, (hidden_size,), minval=tiny * max_phase, maxval=max_phase)
        stored = self.skip.dtype
        self.nu = jnp.log(-0.5 * jnp.log(radius2)).astype(stored)
        self.theta = jnp.log(phase).astype(stored)
        self.gamma_log = (0.5 * jnp.log1p(-radius2)).astype(stored)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Complex[Array, " hidden_size"]:
        return complex_zero_state((self.hidden_size,), self.nu)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Array]:
        """$γ ⊙ (B x)$ and $D x$."""
        check_inputs(xs, self.input_size)
        gamma = jnp.expand_dims(jnp.exp(at_least_float32(self.gamma_log)), 0)
        real, imag = (gamma * at_least_float32(xs @ part.T) for part in self.weight_x)
        return [jax.lax.complex(real, imag), xs @ self.skip.T]

    def step(
        self, state: Complex[Array, " hidden_size"], u: list[Array]
    ) -> Complex[Array, " hidden_size"]:
        radius = jnp.exp(-jnp.exp(at_least_float32(self.nu)))
        phase = jnp.exp(at_least_float32(self.theta))
        multiplier = jax.lax.complex(radius * jnp.cos(phase), radius * jnp.sin(phase))
        driven, *_ = u
        return multiplier * state + driven

    def readout(
        self, states: Complex[Array, "L hidden_size"], us: list[Array]
    ) -> Float[Array, "L output_size"]:
        _, skip = us
        real, imag = at_least_float32(self.weight_o)
        return states.real @ real.T - states.imag @ imag.T + at_least_float32(skip)
