from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractShortConvCell, check_inputs, check_sizes
from ._chunks_decayed import AbstractDecayedCell, DecayedInputs
from ._decay import init_rate, init_time_step, log_rate_decay, time_step
from ._parts import (
    at_least_float32,
    init_linear,
    merge_heads,
    short_conv_silu,
    split_heads,
    uniform,
    zero_state,
)

_State = Float[Array, "num_heads state_size head_size"]


class Mamba2(AbstractShortConvCell, AbstractDecayedCell):
    r"""The layer of Mamba-2, a state-space model with one decay per head (Dao, Gu, *Transformers
    are SSMs: generalized models and efficient algorithms through structured state space duality*,
    ICML 2024). Per head, with the state $S$ of shape `(state_size, head_size)`,

    $$S' = \exp(-Δ A) S + B\, (Δ s)^\top, \qquad y = S'^\top C + D s.$$

    All heads share $B$ and $C$; $s$, the time step $Δ = \mathrm{softplus}(W_Δ x + b_Δ)$, the rate
    $A = \exp(A_{\log})$ and the number $D$ are each head's own. $s$, $B$ and $C$ are SiLU of a
    short causal convolution, with a bias, of linear maps of $x$, one filter per channel. The
    output, of shape `(output_size,)`, is

    $$W_o\, \mathrm{RMSNorm}(y ⊙ \mathrm{SiLU}(W_g x))$$

    with the $y$ of all heads in one vector.

    The step is affine in the state, and the Jacobian is diagonal: one pass solves it exactly. A
    layer makes outputs chunk by chunk by products of matrices, without the states between.
    """

    weight_c: Float[Array, "state_size input_size"]
    weight_b: Float[Array, "state_size input_size"]
    weight_s: Float[Array, "num_heads*head_size input_size"]
    weight_dt: Float[Array, "num_heads input_size"]
    weight_g: Float[Array, "num_heads*head_size input_size"]
    weight_conv: Float[Array, "conv_width 2*state_size+num_heads*head_size"]
    bias_conv: Float[Array, " 2*state_size+num_heads*head_size"]
    weight_o: Float[Array, "output_size num_heads*head_size"]
    a_log: Float[Array, " num_heads"]
    bias_dt: Float[Array, " num_heads"]
    skip: Float[Array, " num_heads"]
    norm: eqx.nn.RMSNorm
    input_size: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    head_size: int = eqx.field(static=True)
    state_size: int = eqx.field(static=True)
    conv_width: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        head_size: int = 64,
        state_size: int = 128,
        output_size: int | None = None,
        *,
        conv_width: int = 4,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `head_size`, `state_size`: $P$ and $N$, how many features a head has, and how many numbers
            the state holds for each of them; the defaults are those of the authors' code.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `conv_width`: how many inputs the convolution spans, the present one included. With 0,
            both it and the SiLU after it are left out.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, the convolution and its bias with $n$ its width; $A$ uniform in $(1, 16)$;
            $b_Δ$ such that $\mathrm{softplus}(b_Δ)$ is log-uniform in $(10^{-3}, 10^{-1})$;
            $D = 1$.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(
            input_size=input_size,
            num_heads=num_heads,
            head_size=head_size,
            state_size=state_size,
            output_size=output_size,
        )
        if conv_width != 0:
            check_sizes(conv_width=conv_width)
        keys = jax.random.split(key, 10)
        features = num_heads * head_size
        self.weight_c = init_linear(keys[0], state_size, input_size, dtype)
        self.weight_b = init_linear(keys[1], state_size, input_size, dtype)
        self.weight_s = init_linear(keys[2], features, input_size, dtype)
        self.weight_dt = init_linear(keys[3], num_heads, input_size, dtype)
        self.weight_g = init_linear(keys[4], features, input_size, dtype)
        channels, limit = 2 * state_size + features, max(conv_width, 1) ** -0.5
        self.weight_conv = uniform(keys[5], (conv_width, channels), limit, dtype)
        self.bias_conv = uniform(keys[6], (channels,), limit, dtype)
        self.weight_o = init_linear(keys[7], output_size, features, dtype)
        stored = self.weight_c.dtype
        self.a_log = init_rate(keys[8], num_heads, 1.0, dtype)
        self.bias_dt = init_time_step(keys[9], num_heads, dtype)
        self.skip = jnp.ones(num_heads, stored)
        self.norm = eqx.nn.RMSNorm(features, use_bias=False, dtype=stored)
        self.input_size = input_size
        self.num_heads = num_heads
        self.head_size = head_size
        self.state_size = state_size
        self.conv_width = conv_width

    def init_state(self) -> _State:
        return zero_state((self.num_heads, self.state_size, self.head_size), self.weight_b)

    def project(self, xs: Float[Array, "L input_size"]) -> DecayedInputs:
        r"""$C$, $B$, $s$, $\log α = -ΔA$, $Δ$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        weights = [self.weight_c, self.weight_b, self.weight_s]
        channels = jnp.concatenate([xs @ weight.T for weight in weights], axis=-1)
        channels = short_conv_silu(self.weight_conv, channels, self.bias_conv)
        c, b, s = jnp.split(channels, [self.state_size, 2 * self.state_size], axis=-1)
        delta = time_step(xs @ self.weight_dt.T, self.bias_dt)
        return DecayedInputs(
            query=jnp.expand_dims(c, 1),
            key=jnp.expand_dims(b, 1),
            value=split_heads(s, self.num_heads),
            log_decay=jnp.expand_dims(log_rate_decay(delta, self.a_log), 2),
            scale=delta,
            rest=xs @ self.weight_g.T,
        )

    def _output(
        self, y: Float[Array, "L num_heads head_size"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        skip = jnp.expand_dims(at_least_float32(self.skip), (0, 2))
        y = merge_heads(y + skip * at_least_float32(us.value))
        y = jax.vmap(self.norm)(y * jax.nn.silu(at_least_float32(us.rest)))
        return y @ at_least_float32(self.weight_o).T
