from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractShortConvCell, check_eps, check_inputs, check_sizes
from ._decay import init_decay, rate_decay
from ._delta_rule import ROWS, AbstractDeltaCell, DeltaInputs
from ._matrix import AbstractMatrixCell
from ._parts import (
    gated_output,
    init_convolution,
    init_linear,
    l2_normalize,
    project_out,
    short_conv_silu,
    split_heads,
    uniform,
)


class _AbstractDeltaNet(AbstractMatrixCell, AbstractDeltaCell):
    """The gates of a delta rule: $β$ and, if the state decays, $α$."""

    weight_alpha: Float[Array, "num_heads input_size"] | None
    weight_beta: eqx.AbstractVar[Array]
    a_log: Float[Array, " num_heads"] | None
    bias_alpha: Float[Array, " num_heads"] | None
    negative_eigenvalues: bool = eqx.field(static=True)

    def _init_alpha(self, gated: bool, dtype: Any, key_w: PRNGKeyArray, key_a: PRNGKeyArray):
        self.weight_alpha = self.a_log = self.bias_alpha = None
        if gated:
            self.weight_alpha = init_linear(key_w, self.num_heads, self.input_size, dtype)
            self.a_log, self.bias_alpha = init_decay(self.num_heads, dtype, key_a)

    def _alpha(self, xs: Float[Array, "L input_size"]) -> Float[Array, "L num_heads"] | None:
        """The decays, if there are any."""
        if self.weight_alpha is None or self.a_log is None or self.bias_alpha is None:
            return None
        return rate_decay(xs @ self.weight_alpha.T, self.a_log, self.bias_alpha)

    def _beta(
        self, weight: Float[Array, "num_heads input_size"], xs: Float[Array, "L input_size"]
    ) -> Float[Array, "L num_heads"]:
        beta = jax.nn.sigmoid(xs @ weight.T)
        return 2 * beta if self.negative_eigenvalues else beta


class DeltaNet(_AbstractDeltaNet, AbstractShortConvCell):
    r"""The gated delta rule: an associative memory that erases what it held under a key before it
    writes (Schlag et al., *Linear transformers are secretly fast weight programmers*, ICML 2021;
    Yang et al., *Gated delta networks: improving Mamba2 with delta rule*, ICLR 2025). Per head,
    with the state $S$ of shape `(key_size, value_size)`,

    $$S' = α (I - β k k^\top) S + β k v^\top, \qquad y = S'^\top q.$$

    $q$, $k$, $v$ are linear maps of $x$, $q$ and $k$ divided by their norms, and $q$ also by the
    root of `key_size`, as in the authors' code, fla-org/flash-linear-attention; $β = σ(w_β x)$, and
    $α = \exp(-A\,\mathrm{softplus}(w_α x + b_α))$. The output, of shape `(output_size,)`, is
    $W_o\, y$ with the $y$ of all heads in one vector. What Yang et al. put around it, a short
    convolution and an output gate, is there if asked for.

    The step is affine in the state, so one pass solves it exactly. The Jacobian consists of
    `num_heads * value_size` blocks of `key_size × key_size`, the same for all columns of a head.
    Chunks of steps are made by products of matrices (Yang et al., *Parallelizing linear
    transformers with the delta rule over sequence length*, NeurIPS 2024).
    """

    weight_beta: Float[Array, "num_heads input_size"]
    weight_conv: Float[Array, "conv_width num_heads*(2*key_size+value_size)"] | None
    weight_g: Float[Array, "num_heads*value_size input_size"] | None
    weight_norm: Float[Array, "num_heads value_size"] | None
    conv_width: int = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        gated: bool = True,
        negative_eigenvalues: bool = False,
        conv_width: int = 0,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `gated`: whether the state decays; if not, $α = 1$, and there are no parameters for it.
        - `negative_eigenvalues`: whether $β = 2σ(w_β x)$: a step then may reflect the state, as
            well as erase, which tracks parity (Grazzi et al., *Unlocking state-tracking in linear
            RNNs through negative eigenvalues*, ICLR 2025).
        - `conv_width`: how many inputs a short convolution spans, the present one included. With
            0, there is none; else $q$, $k$ (before the division) and $v$ are SiLU of it, one filter
            per channel of the linear maps.
        - `output_gate`: whether the output is $W_o\, (\mathrm{RMSNorm}(y) ⊙ \mathrm{SiLU}(W_g x))$,
            with a norm of each head.
        - `norm_eps`: is added to the mean square of $y$ in this norm. The default is that of
            flash-linear-attention; Qwen3-Next has $10^{-6}$.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, the convolution with $n$ its width, $A$ and $b_α$ as in Mamba-2; the
            norm's weights are 1.
        """
        keys = jax.random.split(key, 9)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, [*keys[:3], keys[5]])
        self._init_alpha(gated, dtype, keys[3], keys[6])
        self.weight_beta = init_linear(keys[4], num_heads, input_size, dtype)
        channels = num_heads * (2 * key_size + value_size)
        self.weight_conv = init_convolution(keys[7], conv_width, channels, dtype)
        self.weight_g = self.weight_norm = None
        if output_gate:
            self.weight_g = init_linear(keys[8], num_heads * value_size, input_size, dtype)
            self.weight_norm = jnp.ones((num_heads, value_size), self.weight_q.dtype)
        self.negative_eigenvalues = negative_eigenvalues
        self.conv_width = conv_width
        self.norm_eps = check_eps(norm_eps)

    def project(self, xs: Float[Array, "L input_size"]) -> DeltaInputs:
        """$q$, $k$, $v$, $β$, $α$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        q, k, v = (split_heads(x, self.num_heads) for x in self._channels(xs))
        beta = self._beta(self.weight_beta, xs)
        gate = None if self.weight_g is None else xs @ self.weight_g.T
        return DeltaInputs(_query(q), [l2_normalize(k)], [v], [beta], self._alpha(xs), gate)

    def _channels(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L features"]]:
        """The inputs of the maps to $q$, $k$ and $v$."""
        maps = [xs @ weight.T for weight in (self.weight_q, self.weight_k, self.weight_v)]
        if self.weight_conv is None:
            return maps
        keys = self.num_heads * self.key_size
        channels = short_conv_silu(self.weight_conv, jnp.concatenate(maps, axis=-1))
        return jnp.split(channels, [keys, 2 * keys], axis=-1)

    def _output(
        self, y: Float[Array, "L num_heads value_size"], us: DeltaInputs
    ) -> Float[Array, "L output_size"]:
        if us.gate is None or self.weight_norm is None:
            return project_out(y, self.weight_o)
        weights = self.weight_norm, self.weight_o
        return gated_output(y, us.gate, *weights, centred=False, eps=self.norm_eps)


class DeltaProduct(_AbstractDeltaNet):
    r"""The delta rule with several corrections per step (Siems et al., *DeltaProduct: improving
    state-tracking in linear RNNs via Householder products*, 2025). Per head, with the state $S$ of
    shape `(key_size, value_size)`, a step decays it, then corrects it $n$ times, one after another:

    $$S_0 = α S, \qquad S_j = (I - β_j k_j k_j^\top) S_{j-1} + β_j k_j v_j^\top, \qquad S' = S_n,
    \qquad y = S'^\top q.$$

    Each correction has a $k_j$, $v_j$ and $β_j$ of its own. With $β$ up to 2, each is a generalised
    Householder reflection, and a step may permute up to $n + 1$ elements; $n = 1$ is
    [`pararnn.DeltaNet`][], whose maps these are: $q$, $k_j$, $v_j$ are linear maps of $x$, $q$ and
    $k_j$ divided by their norms, and $q$ by the root of `key_size` too, $β_j = 2σ(w_{βj} x)$,
    $α = \exp(-A\,\mathrm{softplus}(w_α x + b_α))$, and the output, of shape `(output_size,)`, is
    $W_o\, y$ with the $y$ of all heads in one vector.

    The step is affine in the state, so one pass solves it exactly. The Jacobian consists of
    `num_heads * value_size` blocks of `key_size × key_size`, the same for all columns of a head.
    """

    chunk_size: ClassVar[int] = ROWS // 2

    weight_k: Float[Array, "num_factors num_heads*key_size input_size"]
    weight_v: Float[Array, "num_factors num_heads*value_size input_size"]
    weight_beta: Float[Array, "num_factors num_heads input_size"]
    num_factors: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        num_factors: int = 2,
        gated: bool = True,
        negative_eigenvalues: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `num_factors`: how many corrections a step makes, $n$.
        - `gated`: whether the state decays; if not, $α = 1$, and there are no parameters for it.
        - `negative_eigenvalues`: whether $β$ is in $(0, 2)$; otherwise it is $σ(w_β x)$.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, $A$ and $b_α$ as in Mamba-2.
        """
        check_sizes(num_factors=num_factors)
        keys = jax.random.split(key, 7)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, [*keys[:3], keys[5]])
        self._init_alpha(gated, dtype, keys[3], keys[6])

        def stacked(key, outputs):
            return uniform(key, (num_factors, outputs, input_size), input_size**-0.5, dtype)

        self.weight_k = stacked(keys[1], num_heads * key_size)
        self.weight_v = stacked(keys[2], num_heads * value_size)
        self.weight_beta = stacked(keys[4], num_heads)
        self.num_factors = num_factors
        self.negative_eigenvalues = negative_eigenvalues

    def project(self, xs: Float[Array, "L input_size"]) -> DeltaInputs:
        """$q$, all $k_j$, $v_j$ and $β_j$, and $α$."""
        check_inputs(xs, self.input_size)
        q = _query(split_heads(xs @ self.weight_q.T, self.num_heads))
        ks = [l2_normalize(split_heads(xs @ weight.T, self.num_heads)) for weight in self.weight_k]
        vs = [split_heads(xs @ weight.T, self.num_heads) for weight in self.weight_v]
        betas = [self._beta(weight, xs) for weight in self.weight_beta]
        return DeltaInputs(q, ks, vs, betas, self._alpha(xs))


def _query(q: Float[Array, "L heads key_size"]) -> Float[Array, "L heads key_size"]:
    """Queries of unit length, divided by the root of their size as in softmax attention."""
    return q.shape[-1] ** -0.5 * l2_normalize(q)
