from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractShortConvCell, check_attention, check_inputs, check_sizes
from ._decay import init_decay, rate_decay
from ._parts import (
    at_least_float32,
    init_linear,
    merge_heads,
    short_conv_silu,
    split_heads,
    uniform,
    zero_state,
)

_State = Float[Array, "num_heads key_size value_size"]


class M2RNN(AbstractShortConvCell):
    r"""A nonlinear recurrence of matrices (Mishra et al., *M²RNN: Non-linear RNNs with
    matrix-valued states for scalable language modeling*, 2026). Per head, with the state $H$ of
    shape `(key_size, value_size)`,

    $$Z = \tanh(H W + k v^\top), \quad H' = f H + (1-f) Z, \quad y = q^\top H' + D ⊙ v.$$

    All heads share the query $q$ and the key $k$; the value $v$, the matrix $W$, which starts as
    the identity, and the forget gate $f$ are each head's own. All but $H$ comes from the inputs
    alone: $q$, $k$, $v$ are SiLU of a short causal convolution of linear maps of $x$, one filter
    per channel, and $f = \exp(-A\,\mathrm{softplus}(w_f x + b_f))$. The output, of shape
    `(output_size,)`, is

    $$W_o\, \mathrm{RMSNorm}(y ⊙ \mathrm{SiLU}(W_g x))$$

    with the $y$ of all heads in one vector.

    Each row of $H$ is a leaky Elman network of width `value_size`: the Jacobian consists of
    `num_heads * key_size` blocks of `value_size × value_size`, the blocks of a head sharing $W$ and
    $f$: $∂H'_{kv}/∂H_{kw} = f δ_{vw} + (1-f)(1 - Z_{kv}^2) W_{wv}$.
    """

    weight_q: Float[Array, "key_size input_size"]
    weight_k: Float[Array, "key_size input_size"]
    weight_v: Float[Array, "num_heads*value_size input_size"]
    weight_f: Float[Array, "num_heads input_size"]
    weight_g: Float[Array, "num_heads*value_size input_size"]
    weight_conv: Float[Array, "conv_width 2*key_size+num_heads*value_size"]
    weight_h: Float[Array, "num_heads value_size value_size"]
    weight_o: Float[Array, "output_size num_heads*value_size"]
    skip: Float[Array, "num_heads value_size"]
    a_log: Float[Array, " num_heads"]
    bias_f: Float[Array, " num_heads"]
    norm: eqx.nn.RMSNorm
    input_size: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)
    conv_width: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int = 64,
        value_size: int = 16,
        output_size: int | None = None,
        *,
        conv_width: int = 4,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each; the defaults are the paper's.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `conv_width`: how many inputs the convolution spans, the present one included. With 0,
            both it and the SiLU after it are left out.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, the convolution with $n$ its width; $W$ the identity, $D = 1$, and $A$ and
            $b_f$ as in Mamba-2.
        """
        output_size = check_attention(input_size, num_heads, key_size, value_size, output_size)
        if conv_width != 0:
            check_sizes(conv_width=conv_width)
        keys = jax.random.split(key, 8)
        values = num_heads * value_size
        self.weight_q = init_linear(keys[0], key_size, input_size, dtype)
        self.weight_k = init_linear(keys[1], key_size, input_size, dtype)
        self.weight_v = init_linear(keys[2], values, input_size, dtype)
        self.weight_f = init_linear(keys[3], num_heads, input_size, dtype)
        self.weight_g = init_linear(keys[4], values, input_size, dtype)
        channels, limit = 2 * key_size + values, max(conv_width, 1) ** -0.5
        self.weight_conv = uniform(keys[5], (conv_width, channels), limit, dtype)
        identity = jnp.eye(value_size, dtype=self.weight_q.dtype)
        self.weight_h = jnp.tile(identity, (num_heads, 1, 1))
        self.weight_o = init_linear(keys[6], output_size, values, dtype)
        self.skip = jnp.ones((num_heads, value_size), self.weight_q.dtype)
        self.a_log, self.bias_f = init_decay(num_heads, dtype, keys[7])
        self.norm = eqx.nn.RMSNorm(values, use_bias=False, dtype=self.weight_q.dtype)
        self.input_size = input_size
        self.num_heads = num_heads
        self.key_size = key_size
        self.value_size = value_size
        self.conv_width = conv_width

    def init_state(self) -> _State:
        return zero_state((self.num_heads, self.key_size, self.value_size), self.weight_h)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$q$, $k$, $v$, $f$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        weights = [self.weight_q, self.weight_k, self.weight_v]
        channels = jnp.concatenate([xs @ weight.T for weight in weights], axis=-1)
        channels = short_conv_silu(self.weight_conv, channels)
        q, k, v = jnp.split(channels, [self.key_size, 2 * self.key_size], axis=-1)
        v = split_heads(v, self.num_heads)
        f = rate_decay(xs @ self.weight_f.T, self.a_log, self.bias_f)
        return [q, k, v, f, xs @ self.weight_g.T]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        _, k, v, f, _ = u
        outer = jnp.expand_dims(at_least_float32(k), (0, 2)) * jnp.expand_dims(
            at_least_float32(v), 1
        )
        z = jnp.tanh(jnp.einsum("nkv,nvw->nkw", state, at_least_float32(self.weight_h)) + outer)
        f = jnp.expand_dims(f, (1, 2))
        # Not `z + f * (state - z)`: small states would carry the rounding of `z`.
        return f * state + (1 - f) * z

    def readout(
        self,
        states: Float[Array, "L num_heads key_size value_size"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L output_size"]:
        q, _, v, _, g = us
        y = jnp.einsum("lk,lnkv->lnv", at_least_float32(q), states)
        y = y + jnp.expand_dims(at_least_float32(self.skip), 0) * at_least_float32(v)
        y = merge_heads(y) * jax.nn.silu(at_least_float32(g))
        return jax.vmap(self.norm)(y) @ at_least_float32(self.weight_o).T
