"""Residual blocks: a recurrent layer with what surrounds it in a deep network."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._checks import check_flags, check_sequence
from .._packing import zero_unless
from ..adjoints import AbstractAdjoint
from ..cells import SLSTM, AbstractCell, DeltaNet
from ..solvers import AbstractSolver
from ._rnn import RNN

Flags = Bool[Array | np.ndarray, " L"]
Sequence = Float[Array, "L width"]
Vector = Float[Array, " width"]


class AbstractBlock(eqx.Module):
    """A layer with as many features going out as coming in: what [`pararnn.Stack`][] holds.

    One sequence at a time, without a batch axis. Dropout has a key for each call, and ends with
    [`equinox.nn.inference_mode`][].
    """

    @abc.abstractmethod
    def init_state(self, x: Vector | jax.ShapeDtypeStruct | None = None) -> PyTree[Array]:
        """A `state` for the call and for `step` which starts anew; `x` as for [`pararnn.RNN`][]."""

    @abc.abstractmethod
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
        """The whole sequence at once.

        **Arguments:**

        - `xs`: the inputs.
        - `state`: where to continue, as returned by the call or the step before; `None`, or
            `init_state()`, starts anew.
        - `reset`, `mask`: as for [`pararnn.RNN`][]; the outputs of padding are zero.
        - `key`: for dropout. `None` only without dropout or in inference mode.
        - `throw`: as for [`pararnn.RNN`][]; `False` for what is exported.

        **Returns:**

        `(ys, state)`, the outputs in the dtype of the inputs.
        """

    @abc.abstractmethod
    def step(
        self,
        x: Vector,
        state: PyTree[Array] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Vector, PyTree[Array]]:
        """The streaming form: one input in, one output and the state for the next call out. Without
        dropout, the numbers of the parallel call."""


class GatedMLP(eqx.Module):
    r"""$W_d (φ(W_g x) ⊙ W_u x)$."""

    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(self, width, hidden_size, activation, dtype, key):
        keys = jax.random.split(key, 3)
        sizes = [(width, hidden_size), (width, hidden_size), (hidden_size, width)]
        self.gate, self.up, self.down = (
            eqx.nn.Linear(*size, use_bias=False, dtype=dtype, key=k)
            for size, k in zip(sizes, keys, strict=True)
        )
        self.activation = activation

    def __call__(self, x: Vector) -> Vector:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def make_norm(width: int, dtype: Any) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(width, use_bias=False, dtype=dtype)


def without_padding(xs: Sequence, mask: Flags | None) -> Sequence:
    """The inputs of a block, checked, with zeros for padding, which may hold anything."""
    check_sequence("block", xs)
    return xs if mask is None else zero_unless(check_flags("mask", mask, len(xs)), xs)


def add_branch(x: Array, branch: Array, dropout: eqx.nn.Dropout, key: PRNGKeyArray | None) -> Array:
    """A residual connection, in the dtype of `x`: the states of a cell are wider than bfloat16."""
    if branch.shape != x.shape:
        raise ValueError(
            f"The outputs of `cell` must have the shape of its inputs, {x.shape}, to be added to "
            f"them; got {branch.shape}."
        )
    if key is None and dropout.p > 0 and not dropout.inference:
        raise ValueError(
            f"`key` must be given, for dropout with probability {dropout.p}: a key of jax.random, "
            "another one for each call. Without dropout, as for evaluation, call "
            "`equinox.nn.inference_mode(block)` in place of the block."
        )
    return x + dropout(branch.astype(x.dtype), key=key)


class ResidualBlock(AbstractBlock):
    r"""Two residual branches with norms before them, one that mixes along time, one along features:

    $$a = x + \mathrm{RNN}(\mathrm{RMSNorm}(x)), \qquad y = a + W_d (\mathrm{SiLU}(W_g n) ⊙ W_u n),
    \quad n = \mathrm{RMSNorm}(a).$$

    This is how language models hold their mixers. With [`pararnn.DiagonalGRU`][] or
    [`pararnn.DiagonalLSTM`][] the mixer is that of ParaRNN; with [`pararnn.M2RNN`][], a cell which
    has the short convolution, the gates, the norm and the projection of its paper inside, that of
    M²RNN; so have those that `ResidualBlock.slstm` and `ResidualBlock.gated_deltanet` make. Dropout
    is applied to what each branch adds.
    """

    norm: eqx.nn.RMSNorm
    rnn: RNN[AbstractCell]
    mlp_norm: eqx.nn.RMSNorm | None
    mlp: GatedMLP | None
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        width: int,
        cell: AbstractCell,
        solver: AbstractSolver | None = None,
        *,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
        mlp_size: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.silu,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the number of features of inputs and outputs, which the cell must have, too.
        - `cell`, `solver`, `adjoint`, `learn_init`: as for [`pararnn.RNN`][].
        - `mlp_size`: the number of hidden features of the second branch; `None` is twice the
            `width`, and with 0 there is no such branch.
        - `activation`: of its gate, elementwise.
        - `dropout`: the probability of each number that a branch adds to be dropped.
        - `dtype`: of the parameters of norms and MLP.
        - `key`: for the parameters of the MLP.
        """
        self.norm = make_norm(width, dtype)
        self.rnn = RNN(cell, solver, adjoint=adjoint, learn_init=learn_init)
        hidden_size = 2 * width if mlp_size is None else mlp_size
        self.mlp_norm = make_norm(width, dtype) if hidden_size else None
        self.mlp = GatedMLP(width, hidden_size, activation, dtype, key) if hidden_size else None
        self.dropout = eqx.nn.Dropout(dropout)

    @classmethod
    def slstm(
        cls,
        width: int,
        solver: AbstractSolver | None = None,
        *,
        num_heads: int = 4,
        conv_width: int = 4,
        depth: int | float = 0.0,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ) -> "ResidualBlock":
        """The sLSTM block of xLSTM, with its projection up behind the recurrence (Beck et al.,
        *xLSTM: Extended long short-term memory*, 2024).

        The maps of inputs fall into heads as those of the state do, the outputs are normed head by
        head, and the MLP, whose gate has the activation GELU (here in the form with tanh), has
        4/3 of the `width`, rounded up. The convolution, which the paper leaves open, is seen by the
        input and the forget gate, as in the paper's figure.

        Where this departs from the authors' code (the package xlstm, 2.0.6): the convolution has no
        bias; norms before branches are RMS norms, as in all blocks here, where it takes the mean
        out as well; linear maps start as all others here, where it scales them by width and depth;
        and its MLP is rounded up to a multiple of 64.

        **Arguments:**

        - `width`, `solver`, `dropout`, `dtype`, `key`: as for the block.
        - `num_heads`: divides the `width`.
        - `conv_width`: how many inputs the convolution spans; with 0, there is none.
        - `depth`: where in a network the block stands, from 0 for the first to 1 for the last one,
            as for [`pararnn.SLSTM`][].
        """
        key_cell, key_block = jax.random.split(key)
        cell = SLSTM(
            width,
            width,
            num_heads=num_heads,
            num_blocks=num_heads,
            conv_width=conv_width,
            normed=True,
            depth=depth,
            dtype=dtype,
            key=key_cell,
        )
        return cls(
            width,
            cell,
            solver,
            mlp_size=-(-4 * width // 3),
            activation=jax.nn.gelu,
            dropout=dropout,
            dtype=dtype,
            key=key_block,
        )

    @classmethod
    def gated_deltanet(
        cls,
        width: int,
        solver: AbstractSolver | None = None,
        *,
        num_heads: int = 4,
        key_size: int | None = None,
        value_size: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        mlp_size: int | None = None,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ) -> "ResidualBlock":
        """The block of gated DeltaNet (Yang, Kautz, Hatamizadeh, *Gated delta networks: improving
        Mamba2 with delta rule*, ICLR 2025): queries, keys and values through a short convolution
        and SiLU, queries and keys of unit length, the outputs normed head by head, gated and
        projected. Each head has weights of its own for its norm, and convolutions have no bias.

        **Arguments:**

        - `width`, `solver`, `mlp_size`, `dropout`, `dtype`, `key`: as for the block.
        - `num_heads`, `negative_eigenvalues`, `norm_eps`: as for [`pararnn.DeltaNet`][].
        - `key_size`, `value_size`: of each head; `None` is as in the authors' code, where keys have
            3/4 of the `width` in all, and values are twice as long as keys.
        - `conv_width`: how many inputs the convolution spans; with 0, there is none.
        """
        key_cell, key_block = jax.random.split(key)
        key_size = max(1, 3 * width // (4 * num_heads)) if key_size is None else key_size
        cell = DeltaNet(
            width,
            num_heads,
            key_size,
            2 * key_size if value_size is None else value_size,
            negative_eigenvalues=negative_eigenvalues,
            conv_width=conv_width,
            output_gate=True,
            norm_eps=norm_eps,
            dtype=dtype,
            key=key_cell,
        )
        return cls(
            width, cell, solver, mlp_size=mlp_size, dropout=dropout, dtype=dtype, key=key_block
        )

    def init_state(self, x: Vector | jax.ShapeDtypeStruct | None = None) -> PyTree[Array]:
        return self.rnn.init_state(None if x is None else jax.eval_shape(self.norm, x))

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
        key_rnn, key_mlp = (None, None) if key is None else jax.random.split(key)
        normed = jax.vmap(self.norm)(xs)
        ys, state = self.rnn(normed, state, reset=reset, mask=mask, throw=throw)
        xs = add_branch(xs, ys, self.dropout, key_rnn)
        if self.mlp is not None and self.mlp_norm is not None:
            ys = jax.vmap(self.mlp)(jax.vmap(self.mlp_norm)(xs))
            xs = add_branch(xs, ys, self.dropout, key_mlp)
        return xs, state

    def step(
        self,
        x: Vector,
        state: PyTree[Array] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Vector, PyTree[Array]]:
        key_rnn, key_mlp = (None, None) if key is None else jax.random.split(key)
        y, state = self.rnn.step(self.norm(x), state)
        x = add_branch(x, y, self.dropout, key_rnn)
        if self.mlp is not None and self.mlp_norm is not None:
            x = add_branch(x, self.mlp(self.mlp_norm(x)), self.dropout, key_mlp)
        return x, state
