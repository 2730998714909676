from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs, check_sizes
from ._parts import affine, at_least_float32, init_linear, normal
from ._vector import AbstractVectorCell, Vector, Vectors


class PiecewiseLinearRNN(AbstractVectorCell):
    r"""The piecewise-linear recurrent network, a model of chaotic dynamics (Durstewitz, *A state
    space approach for piecewise-linear recurrent neural networks for identifying computational
    dynamics from neural measurements*, 2017; Hess et al., *Generalized teacher forcing for learning
    chaotic dynamics*, ICML 2023):

    $$h_t = A ⊙ h_{t-1} + W\, \mathrm{ReLU}(h_{t-1}) + W_x x_t + b.$$

    As in the source, $W$ has no diagonal, so that $A$ alone is a unit's own memory: the diagonal of
    `weight_h` is not used and its derivative is 0. At a state of exactly 0 the derivative of ReLU
    is taken as 0. The Jacobian is dense. The output is the state, shape `(hidden_size,)`.
    """

    weight_x: Float[Array, "hidden_size input_size"]
    weight_h: Float[Array, "hidden_size hidden_size"]
    decay: Float[Array, " hidden_size"]
    bias: Float[Array, " hidden_size"]

    def __init__(self, input_size: int, hidden_size: int, *, dtype: Any = None, key: PRNGKeyArray):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: $A$ and $W$ are the diagonal and the rest of a random positive
            definite matrix $K$ with largest eigenvalue 1,
            $K \propto R R^\top / \text{hidden\_size} + I$ with $R$ standard normal (Talathi and
            Vartak, *Improving performance of recurrent neural network with ReLU nonlinearity*,
            2015); $W_x$ is uniform in $\pm 1/\sqrt{\text{input\_size}}$, $b = 0$.
        """
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        key_x, key_h = jax.random.split(key)
        self.weight_x = init_linear(key_x, hidden_size, input_size, dtype)
        root = at_least_float32(normal(key_h, (hidden_size, hidden_size), hidden_size**-0.5, dtype))
        matrix = root @ root.T + jnp.eye(hidden_size, dtype=root.dtype)
        matrix = (matrix / jnp.linalg.norm(matrix, 2)).astype(self.weight_x.dtype)
        self.decay = jnp.diagonal(matrix)
        self.weight_h = matrix - jnp.diag(self.decay)
        self.bias = jnp.zeros(hidden_size, self.weight_x.dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def project(self, xs: Float[Array, "L input_size"]) -> Vectors:
        check_inputs(xs, self.input_size)
        return affine(self.weight_x, self.bias, xs)

    def step(self, state: Vector, u: Vector) -> Vector:
        weight = jnp.where(
            jnp.eye(self.hidden_size, dtype=bool), 0, at_least_float32(self.weight_h)
        )
        return (
            at_least_float32(self.decay) * state + weight @ jax.nn.relu(state) + at_least_float32(u)
        )
