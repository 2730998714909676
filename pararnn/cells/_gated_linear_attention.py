from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ._base import AbstractCell, check_eps, check_inputs, check_sizes
from ._chunk_maps import MatrixAlgebra
from ._chunks_decayed import CHUNK_SIZE, apply_channels, decayed_step, kept, reads
from ._parts import (
    affine,
    init_attention,
    init_linear,
    norm_heads,
    split_heads,
    wide,
    zero_state,
)

_State = Float[Array, "num_heads key_size value_size"]

# The paper's root of the decays, which lets them start near 1.
_ROOT = 16


class GatedLinearAttention(AbstractCell):
    r"""Linear attention with a forget gate for each channel of the keys (Yang et al., *Gated linear
    attention transformers with hardware-efficient training*, ICML 2024). Per head, with the state
    $S$ of shape `(key_size, value_size)`,

    $$S' = \mathrm{diag}(α) S + k v^\top, \qquad y = S'^\top q / \sqrt{d}, \qquad
    α = σ(W_α W_R x + b_α)^{1/16},$$

    where $q$, $k$, $v$ are linear maps of $x$, $d$ is `key_size`, and $W_R x$ are `gate_rank`
    numbers. The output, of shape `(output_size,)`, is

    $$W_o\, (\mathrm{RMSNorm}(y) ⊙ \mathrm{SiLU}(W_g x)),$$

    where each head is normalised by itself (the paper has a layer norm here, its authors' code this
    one) and $y$ then is that of all heads in one vector.

    The step is affine in the state, and the Jacobian is diagonal: one pass solves it exactly. A
    layer makes outputs chunk by chunk by products of matrices, without the states between.
    """

    chunk_size: ClassVar[int | None] = CHUNK_SIZE
    chunk_algebra: ClassVar[AbstractAlgebra | None] = MatrixAlgebra()

    weight_q: Float[Array, "num_heads*key_size input_size"]
    weight_k: Float[Array, "num_heads*key_size input_size"]
    weight_v: Float[Array, "num_heads*value_size input_size"]
    weight_rank: Float[Array, "gate_rank input_size"]
    weight_alpha: Float[Array, "num_heads*key_size gate_rank"]
    weight_g: Float[Array, "num_heads*value_size input_size"]
    weight_o: Float[Array, "output_size num_heads*value_size"]
    weight_norm: Float[Array, "num_heads value_size"]
    bias_alpha: Float[Array, " num_heads*key_size"]
    input_size: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        gate_rank: int = 16,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `gate_rank`: the rank of the map to $α$; the default is the paper's.
        - `norm_eps`: is added to the mean square of $y$ in the norm.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs; $b_α = 0$, with which $α$ starts near $0.96$; the norm's weights 1.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(gate_rank=gate_rank)
        keys = jax.random.split(key, 7)
        sizes = input_size, num_heads, key_size, value_size, output_size
        weights = init_attention(*sizes, dtype, keys[:4])
        self.weight_q, self.weight_k, self.weight_v, self.weight_o = weights
        self.weight_rank = init_linear(keys[4], gate_rank, input_size, dtype)
        self.weight_alpha = init_linear(keys[5], num_heads * key_size, gate_rank, dtype)
        self.weight_g = init_linear(keys[6], num_heads * value_size, input_size, dtype)
        self.weight_norm = jnp.ones((num_heads, value_size), self.weight_q.dtype)
        self.bias_alpha = jnp.zeros(num_heads * key_size, self.weight_q.dtype)
        self.input_size = input_size
        self.num_heads = num_heads
        self.key_size = key_size
        self.value_size = value_size
        self.norm_eps = check_eps(norm_eps)

    def init_state(self) -> _State:
        return zero_state((self.num_heads, self.key_size, self.value_size), self.weight_k)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        r"""$q/\sqrt{d}$, $k$, $v$, $\log α$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        maps = (self.weight_q, self.weight_k, self.weight_v)
        q, k, v = (split_heads(xs @ weight.T, self.num_heads) for weight in maps)
        raw = affine(self.weight_alpha, self.bias_alpha, xs @ self.weight_rank.T)
        log_alpha = split_heads(jax.nn.log_sigmoid(wide(raw)) / _ROOT, self.num_heads)
        return [self.key_size**-0.5 * q, k, v, log_alpha, xs @ self.weight_g.T]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        _, k, v, log_alpha, _ = u
        return decayed_step(state, k, v, jnp.exp(log_alpha))

    def readout(
        self,
        states: Float[Array, "L num_heads key_size value_size"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L output_size"]:
        return self._outputs(reads(us[0], states), us)

    def apply_chunk(
        self, state: _State, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        q, k, v, log_alpha, _ = us
        state, y = apply_channels(state, q, k, v, log_alpha, reset)
        return state, self._outputs(y, us)

    def chunk_factor(
        self, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> Float[Array, "#num_heads #key_size 1"]:
        return kept(us[3], reset)

    def _outputs(self, y, us):
        y = norm_heads(y, self.weight_norm, centred=False, eps=self.norm_eps)
        return (y * jax.nn.silu(wide(us[-1]))) @ wide(self.weight_o).T
