import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractShortConvCell, check_inputs, check_sizes
from ._decay import init_time_step, time_step
from ._parts import at_least_float32, init_linear, short_conv_silu, uniform, zero_state

_State = Float[Array, "input_size state_size"]


class SelectiveSSM(AbstractShortConvCell):
    r"""The selective state-space model of Mamba, S6, with the convolution before it (Gu, Dao,
    *Mamba: linear-time sequence modeling with selective state spaces*, 2023). With
    $s = \mathrm{SiLU}(\mathrm{conv}(x) + b)$, a causal convolution with one filter per feature, and
    a state $h$ of shape `(input_size, state_size)`,

    $$h_t = \exp(Δ_t A) ⊙ h_{t-1} + (Δ_t ⊙ s_t) B_t^\top, \qquad y_t = h_t C_t + D ⊙ s_t,$$

    where $A = -\exp(A_{\log})$ is a matrix, and what selects comes from the input:
    $B_t = W_B s_t$ and $C_t = W_C s_t$, shared by all features, and
    $Δ_t = \mathrm{softplus}(W_Δ W_R s_t + b_Δ)$, one time step per feature, through `dt_rank`
    numbers. $A$ is discretised with a zero-order hold, $B$ by Euler's rule, as in the authors'
    code. The block around it (two projections and a gate) is not part of the cell.

    The step is affine in the state, so one pass solves it exactly; the Jacobian is diagonal. What
    is kept for each step are $Δ_t$, $B_t$, $C_t$ and $s_t$, not the matrices of the state's size,
    which `step` forms. The output has shape `(input_size,)`; the state has at least float32.
    """

    weight_conv: Float[Array, "conv_width input_size"]
    bias_conv: Float[Array, " input_size"]
    weight_b: Float[Array, "state_size input_size"]
    weight_c: Float[Array, "state_size input_size"]
    weight_rank: Float[Array, "dt_rank input_size"]
    weight_dt: Float[Array, "input_size dt_rank"]
    bias_dt: Float[Array, " input_size"]
    a_log: Float[Array, "input_size state_size"]
    skip: Float[Array, " input_size"]
    input_size: int = eqx.field(static=True)
    state_size: int = eqx.field(static=True)
    conv_width: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        state_size: int = 16,
        *,
        dt_rank: int | None = None,
        conv_width: int = 4,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs and outputs.
        - `state_size`: how many numbers the state holds for each feature; the default is the
            paper's.
        - `dt_rank`: the rank of the map to $Δ$; `None` is `input_size / 16`, rounded up.
        - `conv_width`: how many inputs the convolution spans, the present one included. With 0,
            both it and the SiLU after it are left out.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, the convolution and its bias with $n$ its width; $A_{\log} = \log n$ for
            the $n$-th number of each feature, from 1; $b_Δ$ such that $\mathrm{softplus}(b_Δ)$ is
            log-uniform in $(10^{-3}, 10^{-1})$; $D = 1$.
        """
        check_sizes(input_size=input_size, state_size=state_size)
        dt_rank = math.ceil(input_size / 16) if dt_rank is None else dt_rank
        check_sizes(dt_rank=dt_rank)
        if conv_width != 0:
            check_sizes(conv_width=conv_width)
        keys = jax.random.split(key, 7)
        limit = max(conv_width, 1) ** -0.5
        self.weight_conv = uniform(keys[0], (conv_width, input_size), limit, dtype)
        self.bias_conv = uniform(keys[1], (input_size,), limit, dtype)
        self.weight_b = init_linear(keys[2], state_size, input_size, dtype)
        self.weight_c = init_linear(keys[3], state_size, input_size, dtype)
        self.weight_rank = init_linear(keys[4], dt_rank, input_size, dtype)
        self.weight_dt = init_linear(keys[5], input_size, dt_rank, dtype)
        stored = self.weight_dt.dtype
        self.bias_dt = init_time_step(keys[6], input_size, dtype)
        a_log = jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.result_type(float)))
        self.a_log = jnp.tile(a_log, (input_size, 1)).astype(stored)
        self.skip = jnp.ones(input_size, stored)
        self.input_size = input_size
        self.state_size = state_size
        self.conv_width = conv_width

    def init_state(self) -> _State:
        return zero_state((self.input_size, self.state_size), self.a_log)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$Δ$, $B$, $C$ and $s$."""
        check_inputs(xs, self.input_size)
        xs = short_conv_silu(self.weight_conv, xs, self.bias_conv)
        delta = time_step(xs @ self.weight_rank.T @ self.weight_dt.T, self.bias_dt)
        return [delta, xs @ self.weight_b.T, xs @ self.weight_c.T, xs]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        delta, b, _, x = u
        kept = jnp.exp(-jnp.expand_dims(delta, 1) * jnp.exp(at_least_float32(self.a_log)))
        return kept * state + jnp.outer(delta * at_least_float32(x), at_least_float32(b))

    def readout(
        self,
        states: Float[Array, "L input_size state_size"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L input_size"]:
        _, _, c, x = us
        y = jnp.einsum("lcn,ln->lc", states, at_least_float32(c))
        return y + jnp.expand_dims(at_least_float32(self.skip), 0) * at_least_float32(x)
