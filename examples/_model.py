"""A small sequence model: an embedding, residual blocks with a recurrence in each, a readout."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import pararnn as prnn

from ._cells import CELLS

_float32 = jnp.float32


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
                prnn.RNN(CELLS[cell](width, key_cell), solver=solver),
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
    rnns = [prnn.RNN(block.rnn.cell, solver=solver) for block in model.blocks]
    return eqx.tree_at(lambda m: [block.rnn for block in m.blocks], model, rnns)
