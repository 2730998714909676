"""A residual block whose recurrence is gated from outside, as those of Mamba and the mLSTM."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..adjoints import AbstractAdjoint
from ..cells import MLSTM, AbstractCell, SelectiveSSM
from ..solvers import AbstractSolver
from ._blocks import AbstractBlock, Flags, Sequence, Vector, add_branch, make_norm, without_padding
from ._rnn import RNN


class GatedBlock(AbstractBlock):
    r"""One residual branch, whose recurrence sees a projection of the inputs, and is multiplied by
    another one:

    $$y = x + W_o \left(\mathrm{RNN}(W_x n) ⊙ φ(W_g n)\right), \qquad n = \mathrm{RMSNorm}(x).$$

    With [`pararnn.SelectiveSSM`][], which has the short convolution inside, this is the block of
    Mamba (Gu, Dao, *Mamba: linear-time sequence modeling with selective state spaces*, 2023), which
    `GatedBlock.mamba` makes; `GatedBlock.mlstm` makes one of xLSTM. Dropout is applied to what the
    branch adds.
    """

    norm: eqx.nn.RMSNorm
    inputs: eqx.nn.Linear
    gate: eqx.nn.Linear
    rnn: RNN[AbstractCell]
    output: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        inner_size: int,
        cell: AbstractCell,
        solver: AbstractSolver | None = None,
        *,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
        activation: Callable[[Array], Array] = jax.nn.silu,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the number of features of inputs and outputs.
        - `inner_size`: the number of features that the cell takes and gives.
        - `cell`, `solver`, `adjoint`, `learn_init`: as for [`pararnn.RNN`][].
        - `activation`: of the gate, elementwise.
        - `dropout`: the probability of each number that the branch adds to be dropped.
        - `dtype`: of the parameters of norm and projections.
        - `key`: for the parameters of the projections.
        """
        keys = jax.random.split(key, 3)

        def linear(inputs, outputs, key):
            return eqx.nn.Linear(inputs, outputs, use_bias=False, dtype=dtype, key=key)

        self.norm = make_norm(width, dtype)
        self.inputs = linear(width, inner_size, keys[0])
        self.gate = linear(width, inner_size, keys[1])
        self.rnn = RNN(cell, solver, adjoint=adjoint, learn_init=learn_init)
        self.output = linear(inner_size, width, keys[2])
        self.dropout = eqx.nn.Dropout(dropout)
        self.activation = activation

    @classmethod
    def mamba(
        cls,
        width: int,
        solver: AbstractSolver | None = None,
        *,
        expand: int = 2,
        state_size: int = 16,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ) -> "GatedBlock":
        """The block of Mamba.

        **Arguments:**

        - `width`, `solver`, `dropout`, `dtype`, `key`: as for the block.
        - `expand`: how many times as many features the cell has.
        - `state_size`: the number of state elements for each of these.
        """
        key_cell, key_block = jax.random.split(key)
        inner_size = expand * width
        cell = SelectiveSSM(inner_size, state_size, dtype=dtype, key=key_cell)
        return cls(width, inner_size, cell, solver, dropout=dropout, dtype=dtype, key=key_block)

    @classmethod
    def mlstm(
        cls,
        width: int,
        solver: AbstractSolver | None = None,
        *,
        expand: int = 2,
        num_heads: int = 4,
        conv_width: int = 4,
        block_size: int = 4,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ) -> "GatedBlock":
        r"""The mLSTM block of xLSTM, with its projection up before the recurrence (Beck et al.,
        *xLSTM: Extended long short-term memory*, 2024). With $u = W_x n$ and
        $c = \mathrm{SiLU}(\mathrm{conv}(u))$,

        $$y = x + W_o \left((\mathrm{norm}(\mathrm{mLSTM}(q, k, v)) + D ⊙ c)
        ⊙ \mathrm{SiLU}(W_g n)\right).$$

        $q$ and $k$ are block-diagonal maps of $c$, $v$ is one of $u$, the norm is of each head, and
        $D$, the learnable skip, starts at 1. The gate from outside takes the place of the cell's.
        Input and forget gates are affine maps of $u$, as in the paper's formulas.

        Where this departs from the authors' code (the package xlstm, 2.0.6): there the gates see
        $q$, $k$ and $v$ of all heads, and the convolution has a bias; the norm before is an RMS
        norm, as in all blocks here, where it takes the mean out as well; and linear maps start as
        all others here, where it scales them by width and depth.

        **Arguments:**

        - `width`, `solver`, `dropout`, `dtype`, `key`: as for the block.
        - `expand`: how many times as many features the cell has.
        - `num_heads`: divides these, and so does
        - `block_size`: the size of the blocks of the maps to $q$, $k$ and $v$.
        - `conv_width`: how many inputs the convolution spans; with 0, there is none, and $c = u$.
        """
        key_cell, key_block = jax.random.split(key)
        inner_size = expand * width
        for name, size in (("num_heads", num_heads), ("block_size", block_size)):
            if size < 1 or inner_size % size:
                raise ValueError(
                    f"`{name}` must divide `expand * width`, {inner_size}; got {size}."
                )
        cell = MLSTM(
            inner_size,
            num_heads,
            inner_size // num_heads,
            inner_size // num_heads,
            conv_width=conv_width,
            num_blocks=inner_size // block_size,
            bare=True,
            dtype=dtype,
            key=key_cell,
        )
        return cls(width, inner_size, cell, solver, dropout=dropout, dtype=dtype, key=key_block)

    def init_state(self, x: Vector | jax.ShapeDtypeStruct | None = None) -> PyTree[Array]:
        seen = None if x is None else jax.eval_shape(lambda x: self.inputs(self.norm(x)), x)
        return self.rnn.init_state(seen)

    def _gated(self, y: Array, normed: Array) -> Array:
        gate = self.activation(self.gate(normed))
        return self.output((y * gate.astype(y.dtype)).astype(normed.dtype))

    def __call__(
        self,
        xs: Sequence,
        state: PyTree[Array] | None = None,
        *,
        reset: Flags | None = None,
        mask: Flags | None = None,
        key: PRNGKeyArray | None = None,
        throw: bool = True,
    ) -> tuple[Sequence, PyTree[Array]]:
        xs = without_padding(xs, mask)
        normed = jax.vmap(self.norm)(xs)
        us = jax.vmap(self.inputs)(normed)
        ys, state = self.rnn(us, state, reset=reset, mask=mask, throw=throw)
        return add_branch(xs, jax.vmap(self._gated)(ys, normed), self.dropout, key), state

    def step(
        self, x: Vector, state: PyTree[Array] | None = None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Vector, PyTree[Array]]:
        normed = self.norm(x)
        y, state = self.rnn.step(self.inputs(normed), state)
        return add_branch(x, self._gated(y, normed), self.dropout, key), state
