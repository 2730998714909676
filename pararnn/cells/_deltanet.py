from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractCell, check_inputs, check_sizes
from ._parts import decay, init_decay, init_linear, merge_heads, split_heads, unit, zero_state

_State = Float[Array, "num_heads key_size value_size"]


class DeltaNet(AbstractCell):
    r"""The gated delta rule: an associative memory that erases what it held under a key before it
    writes (Schlag et al., *Linear transformers are secretly fast weight programmers*, ICML 2021;
    Yang et al., *Gated delta networks: improving Mamba2 with delta rule*, ICLR 2025). Per head,
    with the state $S$ of shape `(key_size, value_size)`,

    $$S' = α (I - β k k^\top) S + β k v^\top, \qquad y = S'^\top q.$$

    $q$, $k$, $v$ are linear maps of $x$, $q$ and $k$ divided by their norms; $β = σ(w_β x)$, and
    $α = \exp(-A\,\mathrm{softplus}(w_α x + b_α))$. The output, of shape `(output_size,)`, is
    $W_o\, y$ with the $y$ of all heads in one vector.

    The step is affine in the state, so one pass solves it exactly. The Jacobian consists of
    `num_heads * value_size` blocks of `key_size × key_size`, the same for all columns of a head.
    """

    weight_q: Float[Array, "num_heads*key_size input_size"]
    weight_k: Float[Array, "num_heads*key_size input_size"]
    weight_v: Float[Array, "num_heads*value_size input_size"]
    weight_alpha: Float[Array, "num_heads input_size"]
    weight_beta: Float[Array, "num_heads input_size"]
    weight_o: Float[Array, "output_size num_heads*value_size"]
    a_log: Float[Array, " num_heads"]
    bias_alpha: Float[Array, " num_heads"]
    input_size: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, $A$ and $b_α$ as in Mamba-2.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(
            input_size=input_size,
            num_heads=num_heads,
            key_size=key_size,
            value_size=value_size,
            output_size=output_size,
        )
        keys = jax.random.split(key, 7)
        self.weight_q = init_linear(keys[0], num_heads * key_size, input_size, dtype)
        self.weight_k = init_linear(keys[1], num_heads * key_size, input_size, dtype)
        self.weight_v = init_linear(keys[2], num_heads * value_size, input_size, dtype)
        self.weight_alpha = init_linear(keys[3], num_heads, input_size, dtype)
        self.weight_beta = init_linear(keys[4], num_heads, input_size, dtype)
        self.weight_o = init_linear(keys[5], output_size, num_heads * value_size, dtype)
        self.a_log, self.bias_alpha = init_decay(num_heads, dtype, keys[6])
        self.input_size = input_size
        self.num_heads = num_heads
        self.key_size = key_size
        self.value_size = value_size

    def init_state(self) -> _State:
        return zero_state((self.num_heads, self.key_size, self.value_size), self.weight_k)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$q$, $k$, $v$, $α$ and $β$."""
        check_inputs(xs, self.input_size)
        q = unit(split_heads(xs @ self.weight_q.T, self.num_heads))
        k = unit(split_heads(xs @ self.weight_k.T, self.num_heads))
        v = split_heads(xs @ self.weight_v.T, self.num_heads)
        alpha = decay(xs @ self.weight_alpha.T, self.a_log, self.bias_alpha)
        beta = jax.nn.sigmoid(xs @ self.weight_beta.T)
        return [q, k, v, alpha, beta]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        _, k, v, alpha, beta = u
        kept = jnp.expand_dims(alpha, (1, 2)) * state
        held = jnp.einsum("nk,nkv->nv", k, kept)
        change = jnp.expand_dims(beta, 1) * (v - held)
        return kept + jnp.expand_dims(k, 2) * jnp.expand_dims(change, 1)

    def readout(
        self,
        states: Float[Array, "L num_heads key_size value_size"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L output_size"]:
        y = jnp.einsum("lnk,lnkv->lnv", us[0], states)
        return merge_heads(y) @ self.weight_o.T
