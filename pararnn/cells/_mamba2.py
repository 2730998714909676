from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ._base import AbstractCell, check_inputs, check_sizes
from ._chunk_maps import MatrixAlgebra
from ._chunks_decayed import CHUNK_SIZE, decayed_step, kept, reads, through_heads
from ._parts import (
    causal_convolution,
    init_linear,
    inverse_softplus,
    log_uniform,
    merge_heads,
    split_heads,
    uniform,
    wide,
    zero_state,
)

_State = Float[Array, "num_heads state_size head_size"]


class Mamba2(AbstractCell):
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

    chunk_size: ClassVar[int | None] = CHUNK_SIZE
    chunk_algebra: ClassVar[AbstractAlgebra | None] = MatrixAlgebra()

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
        rate = jax.random.uniform(keys[8], (num_heads,), minval=1, maxval=16)
        self.a_log = jnp.log(rate).astype(stored)
        bias_dt = inverse_softplus(log_uniform(keys[9], (num_heads,), 1e-3, 0.1))
        self.bias_dt = bias_dt.astype(stored)
        self.skip = jnp.ones(num_heads, stored)
        self.norm = eqx.nn.RMSNorm(features, use_bias=False, dtype=stored)
        self.input_size = input_size
        self.num_heads = num_heads
        self.head_size = head_size
        self.state_size = state_size
        self.conv_width = conv_width

    @property
    def context(self) -> int:
        return max(self.conv_width - 1, 0)

    @property
    def input_struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.input_size,), self.weight_c.dtype)

    def init_state(self) -> _State:
        return zero_state((self.num_heads, self.state_size, self.head_size), self.weight_b)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$C$, $B$, $s$, $Δ$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        weights = [self.weight_c, self.weight_b, self.weight_s]
        channels = jnp.concatenate([xs @ weight.T for weight in weights], axis=-1)
        if self.conv_width > 0:
            channels = causal_convolution(self.weight_conv, channels)
            channels = jax.nn.silu(channels + jnp.expand_dims(self.bias_conv, 0))
        c, b, s = jnp.split(channels, [self.state_size, 2 * self.state_size], axis=-1)
        raw = wide(xs @ self.weight_dt.T) + jnp.expand_dims(wide(self.bias_dt), 0)
        s = split_heads(s, self.num_heads)
        return [c, b, s, jax.nn.softplus(raw), xs @ self.weight_g.T]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        _, b, s, delta, _ = u
        decay = jnp.exp(-delta * jnp.exp(wide(self.a_log)))
        written = jnp.expand_dims(delta, 1) * wide(s)
        return decayed_step(state, jnp.expand_dims(b, 0), written, jnp.expand_dims(decay, 1))

    def readout(
        self,
        states: Float[Array, "L num_heads state_size head_size"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L output_size"]:
        return self._outputs(reads(jnp.expand_dims(us[0], 1), states), us)

    def apply_chunk(
        self, state: _State, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        c, b, s, delta, _ = us
        written = jnp.expand_dims(delta, 2) * wide(s)
        c, b = jnp.expand_dims(c, 1), jnp.expand_dims(b, 1)
        state, y = through_heads(state, c, b, written, self._log_decay(delta), reset)
        return state, self._outputs(y, us)

    def chunk_factor(
        self, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> Float[Array, "#num_heads #key_size 1"]:
        return kept(self._log_decay(us[3]), reset)

    def _log_decay(self, delta):
        return -delta * jnp.expand_dims(jnp.exp(wide(self.a_log)), 0)

    def _outputs(self, y, us):
        _, _, s, _, g = us
        y = merge_heads(y + jnp.expand_dims(wide(self.skip), (0, 2)) * wide(s))
        return jax.vmap(self.norm)(y * jax.nn.silu(wide(g))) @ wide(self.weight_o).T
