from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_eps, check_inputs, check_sizes
from ._chunks_decayed import AbstractDecayedCell, DecayedInputs
from ._decay import log_gate
from ._matrix import AbstractMatrixCell
from ._parts import affine, gated_output, init_linear, split_heads

# The paper's root of the decays, which lets them start near 1.
_ROOT = 16


class GatedLinearAttention(AbstractMatrixCell, AbstractDecayedCell):
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

    weight_rank: Float[Array, "gate_rank input_size"]
    weight_alpha: Float[Array, "num_heads*key_size gate_rank"]
    weight_g: Float[Array, "num_heads*value_size input_size"]
    weight_norm: Float[Array, "num_heads value_size"]
    bias_alpha: Float[Array, " num_heads*key_size"]
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
        check_sizes(gate_rank=gate_rank)
        keys = jax.random.split(key, 7)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, keys[:4])
        self.weight_rank = init_linear(keys[4], gate_rank, input_size, dtype)
        self.weight_alpha = init_linear(keys[5], num_heads * key_size, gate_rank, dtype)
        self.weight_g = init_linear(keys[6], num_heads * value_size, input_size, dtype)
        self.weight_norm = jnp.ones((num_heads, value_size), self.weight_q.dtype)
        self.bias_alpha = jnp.zeros(num_heads * key_size, self.weight_q.dtype)
        self.norm_eps = check_eps(norm_eps)

    def project(self, xs: Float[Array, "L input_size"]) -> DecayedInputs:
        r"""$q/\sqrt{d}$, $k$, $v$, $\log α$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        q, k, v = self._heads(xs)
        raw = affine(self.weight_alpha, self.bias_alpha, xs @ self.weight_rank.T)
        log_alpha = split_heads(log_gate(raw, _ROOT), self.num_heads)
        return DecayedInputs(self.key_size**-0.5 * q, k, v, log_alpha, rest=xs @ self.weight_g.T)

    def _output(
        self, y: Float[Array, "L num_heads value_size"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        weights = self.weight_norm, self.weight_o
        return gated_output(y, us.rest, *weights, centred=False, eps=self.norm_eps)
