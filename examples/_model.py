"""A small sequence model: an embedding, residual blocks with a recurrence in each, a readout."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import pararnn as prnn

_float32 = jnp.float32


def _m2rnn(width: int, key: PRNGKeyArray) -> prnn.M2RNN:
    """Heads of 16 x 16 that start as machines rather than as slow averages: recurrent matrices that
    turn the state instead of keeping it, forget gates half open, each step's own letter before the
    convolution blurs it, and keys and values large enough for the tanh to bend."""
    key_cell, key_turn = jax.random.split(key)
    heads = max(1, width // 16)
    cell = prnn.M2RNN(width, heads, 16, 16, width, dtype=_float32, key=key_cell)
    turns = jax.random.orthogonal(key_turn, 16, (heads,), dtype=_float32)
    zeros = jnp.zeros(heads, _float32)
    present = jnp.zeros_like(cell.weight_conv).at[-1].set(1)
    return eqx.tree_at(
        lambda c: (c.weight_h, c.a_log, c.bias_f, c.weight_conv, c.weight_k, c.weight_v),
        cell,
        (turns, zeros, zeros, present, 4 * cell.weight_k, 4 * cell.weight_v),
    )


# From the width of the inputs and outputs and a key to a cell.
CELLS: dict[str, Callable[[int, PRNGKeyArray], prnn.AbstractCell]] = {
    "elman": lambda n, key: prnn.Elman(n, n, dtype=_float32, key=key),
    "gru": lambda n, key: prnn.GRU(n, n, dtype=_float32, key=key),
    "lstm": lambda n, key: prnn.LSTM(n, n, dtype=_float32, key=key),
    "diagonal-gru": lambda n, key: prnn.DiagonalGRU(n, n, dtype=_float32, key=key),
    "diagonal-lstm": lambda n, key: prnn.DiagonalLSTM(n, n, dtype=_float32, key=key),
    "minmax": lambda n, key: prnn.MinMax(n, n, dtype=_float32, key=key),
    "m2rnn": _m2rnn,
    "lru": lambda n, key: prnn.LRU(n, n, dtype=_float32, key=key),
}
SOLVERS: dict[str, prnn.AbstractSolver | None] = {
    "auto": None,
    "sequential": prnn.Sequential(),
    "newton": prnn.Newton(),
    "jacobi": prnn.Jacobi(),
    "scan": prnn.AssociativeScan(),
}


class SequenceModel(eqx.Module):
    """From a sequence of tokens, or of real features, to logits at every step. One sequence: use
    `jax.vmap` for batches."""

    embedding: eqx.nn.Embedding | eqx.nn.Linear
    conv: Float[Array, "taps width"] | None
    blocks: list[prnn.ResidualBlock]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        tokens: bool = True,
        cell: str = "gru",
        width: int = 64,
        depth: int = 1,
        conv: int = 0,
        mlp: bool = False,
        solver: prnn.AbstractSolver | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `inputs`, `outputs`: the size of the vocabulary, or the number of real features if
            `tokens` is false; the number of classes.
        - `cell`: a key of `CELLS`.
        - `width`, `depth`: the number of features between blocks, and of blocks.
        - `conv`: over how many steps a causal convolution behind the embedding reaches, 0 for none.
        - `mlp`: whether each block has its second branch, a multi-layer perceptron.
        - `solver`: as for [`pararnn.RNN`][].
        - `key`: for the parameters, all of them float32.
        """
        key_in, key_conv, key_out, *keys = jax.random.split(key, 3 + depth)
        embedding = eqx.nn.Embedding if tokens else eqx.nn.Linear
        self.embedding = embedding(inputs, width, dtype=_float32, key=key_in)
        self.conv = None
        if conv > 0:
            self.conv = jax.random.normal(key_conv, (conv, width), _float32) * conv**-0.5
        self.blocks = []
        for block_key in keys:
            key_cell, key_mlp = jax.random.split(block_key)
            block = prnn.ResidualBlock(
                width,
                CELLS[cell](width, key_cell),
                solver,
                mlp_size=None if mlp else 0,
                dtype=_float32,
                key=key_mlp,
            )
            self.blocks.append(block)
        self.norm = eqx.nn.RMSNorm(width, dtype=_float32)
        self.head = eqx.nn.Linear(width, outputs, dtype=_float32, key=key_out)

    def __call__(self, xs: Any) -> Float[Array, "length outputs"]:
        """`xs` are integers, shape `(length,)`, or real features, `(length, inputs)`."""
        xs = jax.vmap(self.embedding)(xs)
        if self.conv is not None:
            xs = xs + jax.nn.silu(prnn.cells.causal_convolution(self.conv, xs))
        for block in self.blocks:
            xs, _ = block(xs)
        return jax.vmap(lambda x: self.head(self.norm(x)))(xs)


def with_solver(model: SequenceModel, solver: prnn.AbstractSolver | None) -> SequenceModel:
    """The same weights, with another solver for all recurrences."""
    rnns = [prnn.RNN(block.rnn.cell, solver) for block in model.blocks]
    return eqx.tree_at(lambda m: [block.rnn for block in m.blocks], model, rnns)
