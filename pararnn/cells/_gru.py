from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs
from ._parts import (
    at_least_float32,
    init_diagonal_gates,
    init_gates,
    project_gates,
    project_heads,
    recur_heads,
    uniform,
)
from ._vector import AbstractVectorCell, Vector, Vectors, gru_update


class GRU(AbstractVectorCell):
    r"""The gated recurrent unit with the reset gate applied after the recurrent matrix, as in cuDNN
    and [`equinox.nn.GRUCell`][] (Cho et al., *Learning phrase representations using RNN
    encoder-decoder*, EMNLP 2014):

    $$r = σ(u_r + W_r h), \quad z = σ(u_z + W_z h), \quad n = \tanh(u_n + r ⊙ (W_n h + b_n)), \quad
    h' = n + z ⊙ (h - n),$$

    with $u = W_x x + b$. The Jacobian is dense, or block-diagonal over heads, as in FlashRNN
    (Pöppel et al., *FlashRNN: I/O-aware optimization of traditional RNNs on modern hardware*,
    2024). The output is the state, shape `(hidden_size,)`.

    Parameters are stacked in the order $r, z, n$; `weight_h` stacks first the heads and then,
    within each head, these three. With one head that is the layout of [`equinox.nn.GRUCell`][].
    """

    weight_x: Float[Array, "3*hidden_size input_size"]
    weight_h: Float[Array, "3*hidden_size hidden_size/num_heads"]
    bias: Float[Array, " 3*hidden_size"]
    bias_n: Float[Array, " hidden_size"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_heads: int = 1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `num_heads`: into how many diagonal blocks each recurrent matrix falls; divides
            `hidden_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, uniform in $\pm 1/\sqrt{\text{hidden\_size}}$, and the blocks
            of the recurrent matrices in $\pm 1/\sqrt{\text{hidden\_size} / \text{num\_heads}}$.
        """
        *keys, key_n = jax.random.split(key, 4)
        self.weight_x, self.weight_h, self.bias = init_gates(
            3, input_size, hidden_size, num_heads, dtype, keys
        )
        self.bias_n = uniform(key_n, (hidden_size,), hidden_size**-0.5, dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        check_inputs(xs, self.input_size)
        return project_gates(self.weight_x, self.bias, xs, 3)

    def step(self, state: Vector, u: list[Vector]) -> Vector:
        return gru_update(state, u, recur_heads(self.weight_h, state), self.bias_n)


class DiagonalGRU(AbstractVectorCell):
    r"""The GRU with vectors for recurrent weights, "ParaGRU" (Danieli et al., *ParaRNN: Unlocking
    parallel training of nonlinear RNNs for large language models*, 2025):

    $$z = σ(a_z ⊙ h + u_z), \quad r = σ(a_r ⊙ h + u_r), \quad c = \tanh(a_c ⊙ h ⊙ r + u_c), \quad
    h' = z ⊙ c + (1-z) ⊙ h,$$

    with $u = B x + b$ and each $B$ block-diagonal over heads. The Jacobian is diagonal: one tangent
    recovers it, and a parallel solve costs little more than the steps. The output is the state,
    shape `(hidden_size,)`. Parameters are stacked in the order $z, r, c$.
    """

    weight_x: Float[Array, "3 num_heads hidden_size/num_heads input_size/num_heads"]
    weight_h: Float[Array, "3 hidden_size"]
    bias: Float[Array, "3 hidden_size"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_heads: int = 1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `num_heads`: into how many blocks the input matrices fall; divides both sizes.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, distributed as in the paper's code: with $D$ the hidden size
            and $e$ the inputs of a head, $a \sim N(0, (2/\sqrt{5D})^2)$, $B$ uniform in
            $\pm\sqrt{6/(e+D)}$, $b = 0$ but $b_z = -\mathrm{linspace}(0, 1, D)$.
        """
        self.weight_x, self.weight_h, self.bias = init_diagonal_gates(
            3, input_size, hidden_size, num_heads, dtype, jax.random.split(key)
        )
        self.input_size = input_size
        self.hidden_size = hidden_size

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        check_inputs(xs, self.input_size)
        return project_heads(self.weight_x, self.bias, xs)

    def step(self, state: Vector, u: list[Vector]) -> Vector:
        u_z, u_r, u_c = map(at_least_float32, u)
        a_z, a_r, a_c = at_least_float32(self.weight_h)
        z = jax.nn.sigmoid(a_z * state + u_z)
        r = jax.nn.sigmoid(a_r * state + u_r)
        c = jnp.tanh(a_c * state * r + u_c)
        return z * c + (1 - z) * state
