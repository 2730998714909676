from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractShortConvCell, block_sizes, check_inputs, head_sizes
from ._decay import LOG_ZERO
from ._parts import (
    affine,
    at_least_float32,
    init_convolution,
    init_linear,
    norm_heads,
    project_gates,
    recur_heads,
    short_conv_silu,
    split_heads,
    zero_state,
)
from ._vector import AbstractVectorCell, Vector, Vectors

_State = tuple[
    Float[Array, " hidden_size"], Float[Array, " hidden_size"], Float[Array, " hidden_size"]
]


class SLSTM(AbstractVectorCell, AbstractShortConvCell):
    r"""The sLSTM: an LSTM with an exponential input gate and a normaliser (Beck et al., *xLSTM:
    Extended long short-term memory*, 2024), in a smooth form:

    $$\ell' = \log(e^{\ell + \log σ(\tilde f)} + e^{\tilde\imath}), \quad
    w = e^{\tilde\imath - \ell'},$$

    $$v' = v + w ⊙ (\tanh\tilde z - v), \quad h' = σ(\tilde o) ⊙ v',$$

    where each raw gate is $W_x x + b + R h$ with $R$ block-diagonal over heads. The state is
    $(\ell, v, h)$, the output $h$, each of shape `(hidden_size,)`.

    The paper's state $(c, n, m)$, in which $m$ is a running maximum that keeps the exponentials in
    range, is the same recurrence: $v = c/n$ and $\ell = \log n + m$. Here nothing needs a maximum,
    so there is no kink and one state less, and $∂\ell'/∂\ell = ∂v'/∂v = 1-w$ lies in $[0, 1]$. The
    first step must find $n = 0$, that is $\ell = -∞$; the initial $\ell$ is $-10^{30}$, which gives
    the same numbers and derivatives.

    The Jacobian is dense, or block-diagonal over heads. Parameters are stacked in the order
    $i, f, z, o$; `weight_h` stacks first the heads and then, within each head, these four.
    """

    weight_x: Float[Array, "4*hidden_size input_size/num_blocks"]
    weight_h: Float[Array, "4*hidden_size hidden_size/num_heads"]
    weight_conv: Float[Array, "conv_width input_size"] | None
    weight_norm: Float[Array, "num_heads hidden_size/num_heads"] | None
    bias: Float[Array, " 4*hidden_size"]
    conv_width: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_heads: int = 1,
        num_blocks: int = 1,
        conv_width: int = 0,
        normed: bool = False,
        depth: int | float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and outputs.
        - `num_heads`: into how many diagonal blocks each recurrent matrix falls; divides
            `hidden_size`.
        - `num_blocks`: the same for the matrix of each gate that meets the inputs; divides
            `input_size`, too.
        - `conv_width`: how many inputs a short convolution spans, the present one included. With
            0, there is none; else SiLU of it is what the gates $i$ and $f$ see in place of $x$.
        - `normed`: whether the output is $h$ of each head, its mean taken from it, divided by the
            standard deviation, and times a weight per feature, at first 1.
        - `depth`: where in a network the cell stands, $i / (n - 1)$ for block $i$ of $n$, counted
            from 0: deeper ones start with longer memories.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for $W_x$ and the convolution, uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            columns of a block, and the width. As in the paper's code, $R = 0$, and $b = 0$ but for
            the forget gate, where unit $j$ of the $d$ units of a head has
            $5 - 12\,(j/(d-1))^{0.3 + 1.3\,\text{depth}}$.
        """
        if isinstance(depth, bool) or not isinstance(depth, (int, float)):
            raise TypeError(f"`depth` must be a Python number; got {depth!r}.")
        if not 0 <= depth <= 1:
            raise ValueError(
                f"`depth` must be in [0, 1], of the first and last block; got {depth}."
            )
        block, _ = block_sizes(num_blocks, input_size=input_size, hidden_size=hidden_size)
        (head_size,) = head_sizes(num_heads, hidden_size=hidden_size)
        self.weight_x = init_linear(key, 4 * hidden_size, block, dtype)
        key = jax.random.fold_in(key, 1)
        self.weight_conv = init_convolution(key, conv_width, input_size, dtype)
        self.weight_h = jnp.zeros((4 * hidden_size, head_size), self.weight_x.dtype)
        place = jnp.linspace(0, 1, head_size, dtype=self.weight_x.dtype)
        bias_f = 5 - 12 * place ** (0.3 + 1.3 * depth)
        bias_f = jnp.tile(bias_f, num_heads)
        zero = jnp.zeros_like(bias_f)
        self.bias = jnp.concatenate([zero, bias_f, zero, zero])
        ones = jnp.ones((num_heads, head_size), self.weight_x.dtype)
        self.weight_norm = ones if normed else None
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.conv_width = conv_width

    def init_state(self) -> _State:
        zero = zero_state(self.hidden_size, self.weight_h)
        return jnp.full_like(zero, LOG_ZERO), zero, zero

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        check_inputs(xs, self.input_size)
        if self.weight_conv is None and self.weight_x.shape[1] == self.input_size:
            return project_gates(self.weight_x, self.bias, xs, 4)
        seen = short_conv_silu(self.weight_conv, xs)
        weights, biases = jnp.split(self.weight_x, 4), jnp.split(self.bias, 4)
        return list(map(affine, weights, biases, [seen, seen, xs, xs]))

    def step(self, state: _State, u: list[Vector]) -> _State:
        ell, v, h = state
        raw = zip(u, recur_heads(self.weight_h, h), strict=True)
        i, f, z, o = (at_least_float32(a) + b for a, b in raw)
        kept = ell + jax.nn.log_sigmoid(f)
        ell = jnp.logaddexp(kept, i)
        w = jax.nn.sigmoid(i - kept)  # exp(i - ell), without the rounding of a large ell
        v = v + w * (jnp.tanh(z) - v)
        return ell, v, jax.nn.sigmoid(o) * v

    def readout(self, states: Any, us: Any) -> Vectors:
        _, _, h = states
        if self.weight_norm is None:
            return h
        return norm_heads(split_heads(h, len(self.weight_norm)), self.weight_norm, centred=True)
