"""Residual blocks: a recurrent layer with what surrounds it in a deep network."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._algebra import AbstractAlgebra
from .._checks import check_flags, check_sequence
from .._packing import zero_unless
from ..adjoints import AbstractAdjoint
from ..cells import AbstractCell, ClampAlgebra, MinMax
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


class _GatedMLP(eqx.Module):
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
    M²RNN. Dropout is applied to what each branch adds.
    """

    norm: eqx.nn.RMSNorm
    rnn: RNN[AbstractCell]
    mlp_norm: eqx.nn.RMSNorm | None
    mlp: _GatedMLP | None
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
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the number of features of inputs and outputs, which the cell must have, too.
        - `cell`, `solver`, `adjoint`, `learn_init`: as for [`pararnn.RNN`][].
        - `mlp_size`: the number of hidden features of the second branch; `None` is twice the
            `width`, and with 0 there is no such branch.
        - `dropout`: the probability of each number that a branch adds to be dropped.
        - `dtype`: of the parameters of norms and MLP.
        - `key`: for the parameters of the MLP.
        """
        self.norm = make_norm(width, dtype)
        self.rnn = RNN(cell, solver, adjoint=adjoint, learn_init=learn_init)
        hidden_size = 2 * width if mlp_size is None else mlp_size
        self.mlp_norm = make_norm(width, dtype) if hidden_size else None
        self.mlp = _GatedMLP(width, hidden_size, jax.nn.silu, dtype, key) if hidden_size else None
        self.dropout = eqx.nn.Dropout(dropout)

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
        check_sequence("block", xs)
        key_rnn, key_mlp = (None, None) if key is None else jax.random.split(key)
        if mask is not None:
            xs = zero_unless(check_flags("mask", mask, len(xs)), xs)
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


class _Cascade(AbstractCell):
    """A MinMax neuron behind a convolution over two inputs and an MLP. As they are part of what the
    cell does with its inputs, resets, padding and streaming are right for them as well."""

    algebra: ClassVar[AbstractAlgebra | None] = ClampAlgebra()

    neuron: MinMax
    conv_norm: eqx.nn.RMSNorm
    conv_past: eqx.nn.Linear
    conv_present: eqx.nn.Linear
    mlp_norm: eqx.nn.RMSNorm
    mlp: _GatedMLP
    neuron_norm: eqx.nn.RMSNorm

    def __init__(self, width, hidden_size, mlp_size, dtype, key):
        keys = jax.random.split(key, 4)
        self.neuron = MinMax(width, hidden_size, width, dtype=dtype, key=keys[0])
        self.conv_norm = make_norm(width, dtype)
        self.conv_past = eqx.nn.Linear(width, width, use_bias=False, dtype=dtype, key=keys[1])
        self.conv_present = eqx.nn.Linear(width, width, use_bias=False, dtype=dtype, key=keys[2])
        self.mlp_norm = make_norm(width, dtype)
        self.mlp = _GatedMLP(width, mlp_size, jax.nn.relu, dtype, keys[3])
        self.neuron_norm = make_norm(width, dtype)

    @property
    def context(self) -> int:
        return 1

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


class MinMaxBlock(AbstractBlock):
    r"""The layer of *MinMax Recurrent Neural Cascades* (2026): a convolution over two inputs and an
    MLP gated by a ReLU in front of a [`pararnn.MinMax`][] neuron, and one residual connection:

    $$a_t = x_t + W_1 n_t + W_0 n_{t-1}, \quad n = \mathrm{RMSNorm}(x), \qquad
    b = a + \mathrm{MLP}(\mathrm{RMSNorm}(a)), \qquad
    y = x + \mathrm{MinMax}(\mathrm{RMSNorm}(b)).$$

    The input before the first counts as 0. The MLP, and with it $b$, is taken to see what the
    convolution gives, behind a norm of its own. Dropout is applied to what the neuron adds.
    """

    rnn: RNN[_Cascade]
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        width: int,
        hidden_size: int | None = None,
        solver: AbstractSolver | None = None,
        *,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
        mlp_size: int | None = None,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the number of features of inputs and outputs.
        - `hidden_size`: the number of elements of the state; `None` is the `width`.
        - `solver`, `adjoint`, `learn_init`: as for [`pararnn.RNN`][].
        - `mlp_size`: the number of hidden features of the MLP; `None` is twice the `width`.
        - `dropout`: the probability of each number that the neuron adds to be dropped.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters.
        """
        hidden_size = width if hidden_size is None else hidden_size
        mlp_size = 2 * width if mlp_size is None else mlp_size
        cell = _Cascade(width, hidden_size, mlp_size, dtype, key)
        self.rnn = RNN(cell, solver, adjoint=adjoint, learn_init=learn_init)
        self.dropout = eqx.nn.Dropout(dropout)

    def init_state(self, x: Vector | jax.ShapeDtypeStruct | None = None) -> PyTree[Array]:
        return self.rnn.init_state(x)

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
        check_sequence("block", xs)
        if mask is not None:
            xs = zero_unless(check_flags("mask", mask, len(xs)), xs)
        ys, state = self.rnn(xs, state, reset=reset, mask=mask, throw=throw)
        return add_branch(xs, ys, self.dropout, key), state

    def step(
        self,
        x: Vector,
        state: PyTree[Array] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Vector, PyTree[Array]]:
        y, state = self.rnn.step(x, state)
        return add_branch(x, y, self.dropout, key), state
