from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs
from ._parts import affine, at_least_float32, init_gates, recur_heads
from ._vector import AbstractVectorCell, Vector, Vectors


class Elman(AbstractVectorCell):
    r"""The simple recurrent network of Elman (*Finding structure in time*, 1990), optionally leaky:

    $$h_t = (1-α)\, h_{t-1} + α\, φ(W h_{t-1} + W_x x_t + b).$$

    With `leak` $α < 1$ this is the Euler discretisation of a continuous-time RNN (CTRNN). The
    Jacobian is dense, or block-diagonal over heads. The output is the state, shape
    `(hidden_size,)`.
    """

    weight_x: Float[Array, "hidden_size input_size"]
    weight_h: Float[Array, "hidden_size hidden_size/num_heads"]
    bias: Float[Array, " hidden_size"]
    leak: float = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_heads: int = 1,
        leak: float = 1.0,
        activation: Callable[[Array], Array] = jnp.tanh,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `num_heads`: into how many diagonal blocks $W$ falls; divides `hidden_size`.
        - `leak`: $α$ in $(0, 1]$.
        - `activation`: $φ$, elementwise.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters, uniform in $\pm 1/\sqrt{\text{hidden\_size}}$, and the blocks
            of $W$ in $\pm 1/\sqrt{\text{hidden\_size} / \text{num\_heads}}$.
        """
        if not 0 < leak <= 1:
            raise ValueError(f"`leak` must be in (0, 1]; got {leak}.")
        self.weight_x, self.weight_h, self.bias = init_gates(
            1, input_size, hidden_size, num_heads, dtype, jax.random.split(key, 3)
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.leak = leak
        self.activation = activation

    def project(self, xs: Float[Array, "L input_size"]) -> Vectors:
        check_inputs(xs, self.input_size)
        return affine(self.weight_x, self.bias, xs)

    def step(self, state: Vector, u: Vector) -> Vector:
        (product,) = recur_heads(self.weight_h, state)
        new = self.activation(product + at_least_float32(u))
        return new if self.leak == 1 else state + self.leak * (new - state)
