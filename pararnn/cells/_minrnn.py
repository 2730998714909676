"""Gated units whose gates do not see the state."""

from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs, check_sizes
from ._parts import at_least_float32, init_linear, project_gates, uniform
from ._vector import AbstractVectorCell, Vector, Vectors


class _AbstractMinRNN(AbstractVectorCell):
    """The state times a factor, plus a number, both from the input."""

    weight_x: Float[Array, "gates*hidden_size input_size"]
    bias: Float[Array, " gates*hidden_size"]

    def _init(
        self, gates: int, input_size: int, hidden_size: int, dtype: Any, key: PRNGKeyArray
    ) -> None:
        """Set weights and biases of stacked gates, and the sizes, which are checked."""
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        key_x, key_b = jax.random.split(key)
        self.weight_x = init_linear(key_x, gates * hidden_size, input_size, dtype)
        self.bias = uniform(key_b, (gates * hidden_size,), input_size**-0.5, dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def step(self, state: Vector, u: list[Vector]) -> Vector:
        kept, written = u
        return kept * state + written


class MinGRU(_AbstractMinRNN):
    r"""A GRU without what its gates see of the state, and without tanh (Feng, Tung, Hassani,
    Bengio, Hajimirsadeghi, *Were RNNs all we needed?*, 2024):

    $$h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ (W_h x_t + b_h), \qquad z_t = σ(W_z x_t + b_z).$$

    The step is affine in the state, so one pass solves it exactly. This is the plain form; the
    paper also has one that scans logarithms, for which it makes the candidate $W_h x_t + b_h$
    positive. Nothing here needs that.

    The Jacobian is diagonal. The state and the output have shape `(hidden_size,)`; the state has at
    least float32.
    """

    def __init__(self, input_size: int, hidden_size: int, *, dtype: Any = None, key: PRNGKeyArray):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, uniform in $\pm 1/\sqrt{\text{input\_size}}$. The rows of the
            weights are those of $z$, then of $h$.
        """
        self._init(2, input_size, hidden_size, dtype, key)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        """$1 - z$ and $z ⊙ (W_h x + b_h)$."""
        check_inputs(xs, self.input_size)
        gates = project_gates(self.weight_x, self.bias, xs, 2)
        return _mix(*(at_least_float32(u) for u in gates))


class MinLSTM(_AbstractMinRNN):
    r"""An LSTM without what its gates see of the state, without tanh and without output gate (Feng,
    Tung, Hassani, Bengio, Hajimirsadeghi, *Were RNNs all we needed?*, 2024):

    $$h_t = f'_t ⊙ h_{t-1} + i'_t ⊙ (W_h x_t + b_h), \qquad
    f' = \frac{f}{f + i}, \quad i' = \frac{i}{f + i}, \quad
    f = σ(W_f x_t + b_f), \quad i = σ(W_i x_t + b_i).$$

    The step is affine in the state, so one pass solves it exactly. This is the plain form, as for
    [`pararnn.MinGRU`][].

    The Jacobian is diagonal. The state and the output have shape `(hidden_size,)`; the state has at
    least float32.
    """

    def __init__(self, input_size: int, hidden_size: int, *, dtype: Any = None, key: PRNGKeyArray):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, uniform in $\pm 1/\sqrt{\text{input\_size}}$. The rows of the
            weights are those of $f$, then of $i$, then of $h$.
        """
        self._init(3, input_size, hidden_size, dtype, key)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        """$f'$ and $i' ⊙ (W_h x + b_h)$."""
        check_inputs(xs, self.input_size)
        gates = project_gates(self.weight_x, self.bias, xs, 3)
        f, i, candidate = (at_least_float32(u) for u in gates)
        # i/(f + i) = σ(log i - log f): where both gates underflow, the quotient would be 0/0.
        return _mix(jax.nn.log_sigmoid(i) - jax.nn.log_sigmoid(f), candidate)


def _mix(raw: Array, candidate: Array) -> list[Array]:
    """`1 - σ(raw)` and `σ(raw)` times the candidate."""
    return [jax.nn.sigmoid(-raw), jax.nn.sigmoid(raw) * candidate]
