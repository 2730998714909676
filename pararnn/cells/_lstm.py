from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs
from ._parts import (
    at_least_float32,
    init_diagonal_gates,
    init_gates,
    init_vectors,
    project_gates,
    project_heads,
    recur_heads,
    zero_state,
)
from ._vector import AbstractVectorCell, Vector, Vectors, lstm_update

_State = tuple[Float[Array, " hidden_size"], Float[Array, " hidden_size"]]


class _AbstractLSTM(AbstractVectorCell):
    """A state of $(c, h)$, of which $h$ is the output."""

    def init_state(self) -> _State:
        zero = zero_state(self.hidden_size, self.weight_x)
        return zero, zero

    def readout(self, states: Any, us: Any) -> Vectors:
        _, h = states
        return h


class LSTM(_AbstractLSTM):
    r"""Long short-term memory with a forget gate (Hochreiter and Schmidhuber, *Long short-term
    memory*, 1997; Gers et al., *Learning to forget: continual prediction with LSTM*, 2000):

    $$i, f, o = σ(u + W h), \quad g = \tanh(u_g + W_g h), \quad c' = f ⊙ c + i ⊙ g, \quad
    h' = o ⊙ \tanh(c'),$$

    with $u = W_x x + b$. The state is $(c, h)$, the output $h$, each of shape `(hidden_size,)`. The
    Jacobian is dense, or block-diagonal over heads.

    Parameters are stacked in the order $i, f, g, o$; `weight_h` stacks first the heads and then,
    within each head, these four. With one head that is the layout of [`equinox.nn.LSTMCell`][],
    whose state is in the other order, $(h, c)$.
    """

    weight_x: Float[Array, "4*hidden_size input_size"]
    weight_h: Float[Array, "4*hidden_size hidden_size/num_heads"]
    bias: Float[Array, " 4*hidden_size"]

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

        - `input_size`, `hidden_size`: the numbers of features of inputs and outputs.
        - `num_heads`: into how many diagonal blocks each recurrent matrix falls; divides
            `hidden_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, uniform in $\pm 1/\sqrt{\text{hidden\_size}}$, and the blocks
            of the recurrent matrices in $\pm 1/\sqrt{\text{hidden\_size} / \text{num\_heads}}$.
        """
        self.weight_x, self.weight_h, self.bias = init_gates(
            4, input_size, hidden_size, num_heads, dtype, jax.random.split(key, 3)
        )
        self.input_size = input_size
        self.hidden_size = hidden_size

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        check_inputs(xs, self.input_size)
        return project_gates(self.weight_x, self.bias, xs, 4)

    def step(self, state: _State, u: list[Vector]) -> _State:
        c, h = state
        return lstm_update(c, u, recur_heads(self.weight_h, h))


class DiagonalLSTM(_AbstractLSTM):
    r"""The LSTM with vectors for recurrent weights, coupled input and forget gates, and peepholes,
    "ParaLSTM" (Danieli et al., *ParaRNN: Unlocking parallel training of nonlinear RNNs for large
    language models*, 2025):

    $$f = σ(a_f ⊙ h + p_f ⊙ c + u_f), \quad g = \tanh(a_g ⊙ h + u_g), \quad
    c' = f ⊙ c + (1-f) ⊙ g,$$

    $$o = σ(a_o ⊙ h + p_o ⊙ c' + u_o), \quad h' = o ⊙ \tanh(c'),$$

    with $u = B x + b$ and each $B$ block-diagonal over heads. The output gate peeps at the *new*
    cell state. The state is $(c, h)$, the output $h$, each of shape `(hidden_size,)`. The Jacobian
    consists of 2×2 blocks, one per hidden unit: two tangents recover it. Parameters are stacked in
    the order $f, g, o$, the peepholes in the order $f, o$.
    """

    weight_x: Float[Array, "3 num_heads hidden_size/num_heads input_size/num_heads"]
    weight_h: Float[Array, "3 hidden_size"]
    peephole: Float[Array, "2 hidden_size"]
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

        - `input_size`, `hidden_size`: the numbers of features of inputs and outputs.
        - `num_heads`: into how many blocks the input matrices fall; divides both sizes.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, distributed as in the paper's code: with $D$ the hidden size
            and $e$ the inputs of a head, $a, p \sim N(0, (2/\sqrt{5D})^2)$, $B$ uniform in
            $\pm\sqrt{6/(e+D)}$, $b = 0$ but $b_f = -\mathrm{linspace}(0, 1, D)$.
        """
        *keys, key_p = jax.random.split(key, 3)
        self.weight_x, self.weight_h, self.bias = init_diagonal_gates(
            3, input_size, hidden_size, num_heads, dtype, keys
        )
        self.peephole = init_vectors(key_p, 2, hidden_size, dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        check_inputs(xs, self.input_size)
        return project_heads(self.weight_x, self.bias, xs)

    def step(self, state: _State, u: list[Vector]) -> _State:
        c, h = state
        u_f, u_g, u_o = map(at_least_float32, u)
        a_f, a_g, a_o = at_least_float32(self.weight_h)
        p_f, p_o = at_least_float32(self.peephole)
        f = jax.nn.sigmoid(a_f * h + p_f * c + u_f)
        g = jnp.tanh(a_g * h + u_g)
        c = f * c + (1 - f) * g
        o = jax.nn.sigmoid(a_o * h + p_o * c + u_o)
        return c, o * jnp.tanh(c)
