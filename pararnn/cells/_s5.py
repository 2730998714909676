"""Diagonal state-space models: one system for all features (S5), or one for each (S4D)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._base import AbstractCell, check_inputs, check_sizes
from ._parts import at_least_float32, normal
from ._vector import AbstractVectorCell
from ._zero_order_hold import complex_zero_state, gain, init_log_step, init_rates, multiplier


class S5(AbstractVectorCell):
    r"""A diagonal state-space model with all features as its inputs and outputs (Smith, Warrington,
    Linderman, *Simplified state space layers for sequence modeling*, ICLR 2023). Of the system in
    continuous time

    $$\dot h = Λ h + B x, \qquad y = 2\,\mathrm{Re}(C h) + D x,$$

    where $Λ$ is complex and diagonal, and one of each pair of conjugate states is kept, the step is
    exact for inputs that are held constant over the time $Δ$ of a step (zero-order hold):

    $$h_t = \bar Λ ⊙ h_{t-1} + \bar B x_t, \qquad \bar Λ = e^{ΛΔ}, \quad
    \bar B = Λ^{-1} (\bar Λ - 1) B, \quad Λ = -e^ν + iω.$$

    $Δ$ is each state's own. This parametrisation keeps $|\bar Λ| < 1$ whatever the parameters. The
    step is affine in the state, so one pass solves it exactly. The Jacobian consists of 2×2 blocks,
    the real and the imaginary part of each state. The state has shape `(hidden_size,)` and is
    complex, complex64 unless the parameters are float64; the output is real, shape
    `(output_size,)`. Complex matrices are stored as real and imaginary part along a leading axis.
    """

    weight_x: Float[Array, "2 hidden_size input_size"]
    weight_o: Float[Array, "2 output_size hidden_size"]
    skip: Float[Array, " input_size"] | Float[Array, "output_size input_size"]
    nu: Float[Array, " hidden_size"]
    omega: Float[Array, " hidden_size"]
    log_step: Float[Array, " hidden_size"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `hidden_size`: the number of complex states, each of which stands for a conjugate pair.
        - `output_size`: the number of features of outputs; `None` is `input_size`. If the two are
            equal, $D$ is diagonal, as in the paper, else a matrix.
        - `dtype`: of the parameters, which are real.
        - `key`: for the parameters: $Λ_n = -\tfrac12 + iπn$, the start S4D-Lin of Gu et al. (see
            [`pararnn.S4D`][]); $Δ$ log-uniform in $(10^{-3}, 10^{-1})$;
            $B \sim N(0, 1/(2\,\text{input\_size}))$ and $C \sim N(0, 1/(2\,\text{hidden\_size}))$
            in both parts; $D \sim N(0, 1)$ if it is diagonal, else
            $N(0, 1/\text{input\_size})$.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        key_x, key_o, key_d, key_s = jax.random.split(key, 4)
        scale = (2 * input_size) ** -0.5
        self.weight_x = normal(key_x, (2, hidden_size, input_size), scale, dtype)
        scale = (2 * hidden_size) ** -0.5
        self.weight_o = normal(key_o, (2, output_size, hidden_size), scale, dtype)
        if output_size == input_size:
            self.skip = normal(key_d, (input_size,), 1.0, dtype)
        else:
            self.skip = normal(key_d, (output_size, input_size), input_size**-0.5, dtype)
        stored = self.skip.dtype
        self.nu, self.omega = init_rates((hidden_size,), stored)
        self.log_step = init_log_step(key_s, hidden_size, stored)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Complex[Array, " hidden_size"]:
        return complex_zero_state((self.hidden_size,), self.nu)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Array]:
        r"""$\bar B x$ and $D x$."""
        check_inputs(xs, self.input_size)
        scale = gain(self.nu, self.omega, self.log_step)
        real, imag = (at_least_float32(xs @ part.T) for part in self.weight_x)
        skip = jnp.expand_dims(self.skip, 0) * xs if self.skip.ndim == 1 else xs @ self.skip.T
        return [jnp.expand_dims(scale, 0) * jax.lax.complex(real, imag), skip]

    def step(
        self, state: Complex[Array, " hidden_size"], u: list[Array]
    ) -> Complex[Array, " hidden_size"]:
        driven, *_ = u
        return multiplier(self.nu, self.omega, self.log_step) * state + driven

    def readout(
        self, states: Complex[Array, "L hidden_size"], us: list[Array]
    ) -> Float[Array, "L output_size"]:
        _, skip = us
        real, imag = at_least_float32(self.weight_o)
        return 2 * (states.real @ real.T - states.imag @ imag.T) + at_least_float32(skip)


class S4D(AbstractCell):
    r"""A diagonal state-space model for each feature (Gu, Goel, Gupta, Ré, *On the parameterization
    and initialization of diagonal state space models*, NeurIPS 2022). Feature $x$, a scalar, drives
    `state_size` complex states, each of which stands for a conjugate pair:

    $$h_t = \bar Λ ⊙ h_{t-1} + \bar B x_t, \qquad y_t = 2\,\mathrm{Re}(C^\top h_t) + D x_t,$$

    discretised with a zero-order hold, as in [`pararnn.S5`][]; $Δ$ is each feature's own. Only the
    product of $B$ and $C$ matters, hence $B = 1$. Features do not meet: mix them before or after.

    The step is affine in the state, so one pass solves it exactly. The Jacobian consists of 2×2
    blocks, the real and the imaginary part of each state. The state has shape
    `(input_size, state_size)` and is complex, complex64 unless the parameters are float64; the
    output is real, shape `(input_size,)`.
    """

    weight_o: Float[Array, "2 input_size state_size"]
    skip: Float[Array, " input_size"]
    nu: Float[Array, "input_size state_size"]
    omega: Float[Array, "input_size state_size"]
    log_step: Float[Array, "input_size 1"]
    input_size: int = eqx.field(static=True)
    state_size: int = eqx.field(static=True)

    def __init__(
        self, input_size: int, state_size: int = 32, *, dtype: Any = None, key: PRNGKeyArray
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs and outputs.
        - `state_size`: the number of complex states of each feature, half of the paper's $N$.
        - `dtype`: of the parameters, which are real.
        - `key`: for the parameters: $Λ_n = -\tfrac12 + iπn$, called S4D-Lin in the paper; $Δ$
            log-uniform in $(10^{-3}, 10^{-1})$; $C \sim N(0, 1/2)$ in both parts;
            $D \sim N(0, 1)$.
        """
        check_sizes(input_size=input_size, state_size=state_size)
        key_o, key_d, key_s = jax.random.split(key, 3)
        self.weight_o = normal(key_o, (2, input_size, state_size), 0.5**0.5, dtype)
        self.skip = normal(key_d, (input_size,), 1.0, dtype)
        stored = self.skip.dtype
        self.nu, self.omega = init_rates((input_size, state_size), stored)
        self.log_step = jnp.expand_dims(init_log_step(key_s, input_size, stored), 1)
        self.input_size = input_size
        self.state_size = state_size

    def init_state(self) -> Complex[Array, "input_size state_size"]:
        return complex_zero_state((self.input_size, self.state_size), self.nu)

    def project(self, xs: Float[Array, "L input_size"]) -> Float[Array, "L input_size"]:
        r"""$x$ itself. The step multiplies by $\bar B$: the product has `state_size` times as many
        numbers."""
        check_inputs(xs, self.input_size)
        return at_least_float32(xs)

    def step(
        self, state: Complex[Array, "input_size state_size"], u: Float[Array, " input_size"]
    ) -> Complex[Array, "input_size state_size"]:
        rates, x = (self.nu, self.omega, self.log_step), jnp.expand_dims(u, 1)
        scale = gain(*rates)
        return multiplier(*rates) * state + jax.lax.complex(scale.real * x, scale.imag * x)

    def readout(
        self,
        states: Complex[Array, "L input_size state_size"],
        us: Float[Array, "L input_size"],
    ) -> Float[Array, "L input_size"]:
        real, imag = (jnp.expand_dims(at_least_float32(part), 0) for part in self.weight_o)
        y = 2 * jnp.sum(states.real * real - states.imag * imag, axis=-1)
        return y + jnp.expand_dims(at_least_float32(self.skip), 0) * us
