"""The residual block of MinMax Recurrent Neural Cascades."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ..cells import AbstractCell, ClampAlgebra, MinMax
from ..solvers import AbstractSolver
from ._blocks import GatedMLP, ResidualBlock, Sequence, make_linear, make_norm
from ._rnn import RNN


class _Cascade(AbstractCell):
    """A MinMax neuron behind a convolution over two inputs and an MLP. These are part of the cell's
    projection, so that resets, padding and streaming hold for the convolution, too."""

    algebra: ClassVar[AbstractAlgebra | None] = ClampAlgebra()

    neuron: MinMax
    conv_norm: eqx.nn.RMSNorm
    conv_past: eqx.nn.Linear
    conv_present: eqx.nn.Linear
    mlp_norm: eqx.nn.RMSNorm
    mlp: GatedMLP
    neuron_norm: eqx.nn.RMSNorm

    def __init__(self, width, hidden_size, mlp_size, dtype, key):
        keys = jax.random.split(key, 4)
        self.neuron = MinMax(width, hidden_size, width, dtype=dtype, key=keys[0])
        self.conv_norm = make_norm(width, dtype)
        self.conv_past = make_linear(width, width, dtype, keys[1])
        self.conv_present = make_linear(width, width, dtype, keys[2])
        self.mlp_norm = make_norm(width, dtype)
        self.mlp = GatedMLP(width, mlp_size, jax.nn.relu, dtype, keys[3])
        self.neuron_norm = make_norm(width, dtype)

    @property
    def context(self) -> int:
        return 1

    @property
    def input_struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.neuron.input_size,), self.neuron.weight_s.dtype)

    def init_state(self) -> Float[Array, " hidden_size"]:
        return self.neuron.init_state()

    def project(self, xs: Sequence) -> list[Float[Array, "L hidden_size"]]:
        present = jax.vmap(self.conv_norm)(xs)
        past = jnp.concatenate([jnp.zeros_like(present[:1]), present])[:-1]
        xs = xs + jax.vmap(self.conv_present)(present) + jax.vmap(self.conv_past)(past)
        xs = xs + jax.vmap(self.mlp)(jax.vmap(self.mlp_norm)(xs))
        return self.neuron.project(jax.vmap(self.neuron_norm)(xs))

    def step(
        self, state: Float[Array, " hidden_size"], u: list[Float[Array, " hidden_size"]]
    ) -> Float[Array, " hidden_size"]:
        return self.neuron.step(state, u)

    def readout(
        self, states: Float[Array, "L hidden_size"], us: list[Float[Array, "L hidden_size"]]
    ) -> Sequence:
        return self.neuron.readout(states, us)


def minmax_block(
    width: int,
    hidden_size: int | None = None,
    *,
    mlp_size: int | None = None,
    solver: AbstractSolver | None = None,
    dropout: float = 0.0,
    dtype: Any = None,
    key: PRNGKeyArray,
) -> ResidualBlock:
    r"""The layer of *MinMax Recurrent Neural Cascades* (2026): a convolution over two inputs and an
    MLP gated by a ReLU in front of a [`pararnn.MinMax`][] neuron, and one residual connection:

    $$a_t = x_t + W_1 n_t + W_0 n_{t-1}, \quad n = \mathrm{RMSNorm}(x), \qquad
    b = a + \mathrm{MLP}(\mathrm{RMSNorm}(a)), \qquad
    y = x + \mathrm{MinMax}(\mathrm{RMSNorm}(b)).$$

    The input before the first counts as 0. The MLP, and with it $b$, is taken to see the output of
    the convolution, behind a norm of its own. Dropout is applied to what the neuron adds.

    Where this departs from the authors' code (the package minmaxrnc, 0.3.0): norms are RMS norms,
    where it has layer norms unless told otherwise; only the bounds $r$ and $s$ have biases, where
    all linear maps have them; the MLP has 2 times the `width` by default, not 1.3 times; and
    parameters start as in [`pararnn.MinMax`][], so that every unit writes, where it has normal
    weights, scaled by width and depth, and biases of 0 (but for its option `'asymmetric'`).

    **Arguments:**

    - `width`: the number of features of inputs and outputs.
    - `hidden_size`: the number of elements of the state; `None` is the `width`.
    - `mlp_size`: the number of hidden features of the MLP; `None` is twice the `width`.
    - `solver`: as for [`pararnn.RNN`][].
    - `dropout`: the probability of each number that the neuron adds to be dropped.
    - `dtype`: of the parameters; the state has at least float32.
    - `key`: for the parameters.
    """
    hidden_size = width if hidden_size is None else hidden_size
    inner_size = 2 * width if mlp_size is None else mlp_size
    cell = _Cascade(width, hidden_size, inner_size, dtype, key)
    rnn = RNN(cell, solver=solver)
    # Norms and MLP are inside the cell.
    return ResidualBlock(width, rnn, norm=False, mlp_size=0, dropout=dropout, dtype=dtype, key=key)
