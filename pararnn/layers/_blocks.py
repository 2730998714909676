"""Residual blocks: a recurrent layer with what surrounds it in a deep network."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import brief, check_flags, check_sequence
from .._packing import zero_unless
from ..cells import AbstractCell
from ._base import AbstractLayer, Flags
from ._rnn import RNN

Sequence = Float[Array, "L width"]
Vector = Float[Array, " width"]


class GatedMLP(eqx.Module):
    r"""$W_d (φ(W_g x) ⊙ W_u x)$."""

    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(self, width, hidden_size, activation, dtype, key):
        keys = jax.random.split(key, 3)
        self.gate = make_linear(width, hidden_size, dtype, keys[0])
        self.up = make_linear(width, hidden_size, dtype, keys[1])
        self.down = make_linear(hidden_size, width, dtype, keys[2])
        self.activation = activation

    def __call__(self, x: Vector) -> Vector:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def make_linear(inputs: int, outputs: int, dtype: Any, key: PRNGKeyArray) -> eqx.nn.Linear:
    """A linear map without bias."""
    return eqx.nn.Linear(inputs, outputs, use_bias=False, dtype=dtype, key=key)


def make_norm(width: int, dtype: Any) -> eqx.nn.RMSNorm:
    """A norm by the root of the mean square, without bias."""
    return eqx.nn.RMSNorm(width, use_bias=False, dtype=dtype)


class ResidualBlock(AbstractLayer):
    r"""Two residual branches behind norms, one that mixes along time, one along features:

    $$a = x + \mathrm{RNN}(\mathrm{RMSNorm}(x)), \qquad y = a + W_d (\mathrm{SiLU}(W_g n) ⊙ W_u n),
    \quad n = \mathrm{RMSNorm}(a).$$

    This is how language models hold their mixers. With [`pararnn.DiagonalGRU`][] or
    [`pararnn.DiagonalLSTM`][] it is the block of ParaRNN; with [`pararnn.M2RNN`][], a cell which
    has the short convolution, the gates, the norm and the projection of its paper inside, that of
    M²RNN. Dropout is applied to what each branch adds. Outputs have the dtype of the inputs.
    """

    norm: eqx.nn.RMSNorm | eqx.nn.Identity
    rnn: RNN[AbstractCell]
    mlp_norm: eqx.nn.RMSNorm | None
    mlp: GatedMLP | None
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        width: int,
        rnn: RNN[AbstractCell],
        *,
        norm: bool = True,
        mlp_size: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.silu,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the number of features of inputs and outputs.
        - `rnn`: the recurrent layer, from `width` features to `width` features.
        - `norm`: normalise the inputs of the first branch.
        - `mlp_size`: the number of hidden features of the second branch; `None` is twice the
            `width`, and with 0 there is no such branch.
        - `activation`: of its gate, elementwise.
        - `dropout`: the probability of each number that a branch adds to be dropped.
        - `dtype`: of the parameters of norms and MLP.
        - `key`: for the parameters of the MLP.
        """
        check_rnn("rnn", rnn)
        self.norm = make_norm(width, dtype) if norm else eqx.nn.Identity()
        self.rnn = rnn
        hidden_size = 2 * width if mlp_size is None else mlp_size
        self.mlp_norm = make_norm(width, dtype) if hidden_size else None
        self.mlp = GatedMLP(width, hidden_size, activation, dtype, key) if hidden_size else None
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
        xs = _without_padding(xs, mask)
        key_rnn, key_mlp = (None, None) if key is None else jax.random.split(key)
        normed = jax.vmap(self.norm)(xs)
        ys, state = self.rnn(normed, state, reset=reset, mask=mask, throw=throw)
        xs = _add_branch(xs, ys, self.dropout, key_rnn)
        if self.mlp is not None and self.mlp_norm is not None:
            ys = jax.vmap(self.mlp)(jax.vmap(self.mlp_norm)(xs))
            xs = _add_branch(xs, ys, self.dropout, key_mlp)
        return xs, state

    def step(
        self, state: PyTree[Array] | None, x: Vector, *, key: PRNGKeyArray | None = None
    ) -> tuple[Vector, PyTree[Array]]:
        _check_input(state, x)
        key_rnn, key_mlp = (None, None) if key is None else jax.random.split(key)
        y, state = self.rnn.step(state, self.norm(x))
        x = _add_branch(x, y, self.dropout, key_rnn)
        if self.mlp is not None and self.mlp_norm is not None:
            x = _add_branch(x, self.mlp(self.mlp_norm(x)), self.dropout, key_mlp)
        return x, state


class GatedBlock(AbstractLayer):
    r"""One residual branch: a recurrence that sees a projection of the inputs, and is multiplied by
    another one, the gate:

    $$y = x + W_o \left(\mathrm{RNN}(W_x n) ⊙ φ(W_g n)\right), \qquad n = \mathrm{RMSNorm}(x).$$

    Dropout is applied to what the branch adds. Outputs have the dtype of the inputs.
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
        rnn: RNN[AbstractCell],
        *,
        activation: Callable[[Array], Array] = jax.nn.silu,
        dropout: float = 0.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the number of features of inputs and outputs.
        - `inner_size`: the number of features inside.
        - `rnn`: the recurrent layer, from `inner_size` features to `inner_size` features.
        - `activation`: of the gate, elementwise.
        - `dropout`: the probability of each number that the branch adds to be dropped.
        - `dtype`: of the parameters of norm and projections.
        - `key`: for the parameters of the projections.
        """
        check_rnn("rnn", rnn)
        keys = jax.random.split(key, 3)
        self.norm = make_norm(width, dtype)
        self.inputs = make_linear(width, inner_size, dtype, keys[0])
        self.gate = make_linear(width, inner_size, dtype, keys[1])
        self.rnn = rnn
        self.output = make_linear(inner_size, width, dtype, keys[2])
        self.dropout = eqx.nn.Dropout(dropout)
        self.activation = activation

    def init_state(self, x: Vector | jax.ShapeDtypeStruct | None = None) -> PyTree[Array]:
        inner = None if x is None else jax.eval_shape(lambda x: self.inputs(self.norm(x)), x)
        return self.rnn.init_state(inner)

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
        xs = _without_padding(xs, mask)
        normed = jax.vmap(self.norm)(xs)
        inner = jax.vmap(self.inputs)(normed)
        ys, state = self.rnn(inner, state, reset=reset, mask=mask, throw=throw)
        return _add_branch(xs, jax.vmap(self._gated)(ys, normed), self.dropout, key), state

    def step(
        self, state: PyTree[Array] | None, x: Vector, *, key: PRNGKeyArray | None = None
    ) -> tuple[Vector, PyTree[Array]]:
        _check_input(state, x)
        normed = self.norm(x)
        y, state = self.rnn.step(state, self.inputs(normed))
        return _add_branch(x, self._gated(y, normed), self.dropout, key), state


def _add_branch(
    x: Array, branch: Array, dropout: eqx.nn.Dropout, key: PRNGKeyArray | None
) -> Array:
    """A residual connection, in the dtype of `x`: the states of a cell are wider than bfloat16."""
    if branch.shape != x.shape:
        raise ValueError(
            f"The outputs of `rnn` must have the shape of its inputs, {x.shape}, to be added to "
            f"them; got {branch.shape}."
        )
    if key is None and dropout.p > 0 and not dropout.inference:
        raise ValueError(
            f"`key` must be given, for dropout with probability {dropout.p}: a key of jax.random, "
            "another one for each call. Without dropout, as for evaluation, call "
            "`equinox.nn.inference_mode(block)` in place of the block."
        )
    return x + dropout(branch.astype(x.dtype), key=key)


def _without_padding(xs: Sequence, mask: Flags | None) -> Sequence:
    """The inputs of a block, checked, with zeros for padding, which may hold anything."""
    check_sequence("block", xs)
    return xs if mask is None else zero_unless(check_flags("mask", mask, len(xs)), xs)


def check_rnn(name: str, rnn: Any) -> None:
    """Raises unless `rnn` is an `RNN`."""
    if not isinstance(rnn, RNN):
        hint = " Wrap the cell: `pararnn.RNN(cell)`." if isinstance(rnn, AbstractCell) else ""
        raise TypeError(f"`{name}` must be a pararnn.RNN; got {brief(rnn)}.{hint}")


def _check_input(state: Any, x: Any) -> None:
    if not eqx.is_array_like(x) or jnp.ndim(x) != 1:
        raise ValueError(
            "`step` takes the state before the input, `block.step(state, x)`, and `x` must have "
            f"shape (width,); got {eqx.tree_pformat(state)} as `state`, and "
            f"{eqx.tree_pformat(x)} as `x`."
        )
