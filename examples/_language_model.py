"""A character-level language model whose memory is a nonlinear recurrent network."""

import json
import math
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import pararnn as prnn

from ._cells import CELLS
from ._text import Windows


class LanguageModel(eqx.Module):
    """Predicts each character from those before it. One sequence: use `jax.vmap` for batches."""

    embedding: eqx.nn.Embedding
    stack: prnn.Stack
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, cell: str, vocabulary: str, width: int, depth: int, *, key: PRNGKeyArray):
        """**Arguments:**

        - `cell`: a key of `CELLS`.
        - `vocabulary`: the characters; a token is a position in this string.
        - `width`: the number of features of a character, and of the state of each RNN.
        - `depth`: the number of blocks.
        - `key`: for the parameters, all of them float32.
        """
        key_embedding, key_head, *keys = jax.random.split(key, 2 + depth)
        size, dtype = len(vocabulary), jnp.float32
        self.embedding = eqx.nn.Embedding(size, width, dtype=dtype, key=key_embedding)
        self.stack = prnn.Stack([_make_block(cell, width, key) for key in keys])
        self.norm = eqx.nn.RMSNorm(width, dtype=dtype)
        self.head = eqx.nn.Linear(width, size, dtype=dtype, key=key_head)

    def _read_out(self, x: Float[Array, " width"]) -> Float[Array, " vocabulary"]:
        return self.head(self.norm(x))

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, "length vocabulary"]:
        """The logits of the character after each of `tokens`, starting from the zero state."""
        xs, _ = self.stack(jax.vmap(self.embedding)(tokens))
        return jax.vmap(self._read_out)(xs)

    def step(
        self, state: PyTree[Array] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " vocabulary"], PyTree[Array]]:
        """One character in; the logits of the next one and the new state out. `None` is the state
        before the first character."""
        x, state = self.stack.step(state, self.embedding(token))
        return self._read_out(x), state

    def residual_blocks(self) -> list[prnn.ResidualBlock]:
        """The blocks, by the type that they were made with."""
        return [block for block in self.stack.layers if isinstance(block, prnn.ResidualBlock)]

    def solver_stats(self, tokens: Int[Array, " length"]) -> list[prnn.Stats]:
        """The solver's report for each block."""
        xs, stats = jax.vmap(self.embedding)(tokens), []
        for block in self.residual_blocks():
            stats.append(block.rnn.solve(jax.vmap(block.norm)(xs)).stats)
            xs, _ = block(xs)
        return stats


def _make_block(cell: str, width: int, key: PRNGKeyArray) -> prnn.ResidualBlock:
    key_cell, key_mlp = jax.random.split(key)
    rnn = prnn.RNN(CELLS[cell](width, key_cell))
    return prnn.ResidualBlock(width, rnn, dtype=jnp.float32, key=key_mlp)


def predict(model: LanguageModel, windows: Windows) -> Float[Array, "batch length vocabulary"]:
    """The logits of every character of the windows but the first. Each window starts from the zero
    state: nothing is known of the text before it."""
    return jax.vmap(model)(windows[:, :-1])


def bits_per_character(
    logits: Float[Array, "batch length vocabulary"], windows: Windows
) -> Float[Array, ""]:
    """The loss of predictions for all characters of the windows but the first."""
    return cross_entropy(logits, windows[:, 1:])


def cross_entropy(
    logits: Float[Array, "batch length vocabulary"], targets: Int[Array, "batch length"]
) -> Float[Array, ""]:
    """The mean, in bits; of a uniform guess it is log2 of the vocabulary's size."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(nats) / math.log(2)


def make_optimiser(lr: float, steps: int) -> optax.GradientTransformation:
    """AdamW. Its learning rate rises to `lr` in a short warm-up, and falls to zero at the end."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, lr, warmup_steps=min(50, steps // 10), decay_steps=steps
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.1)
    )


def update(
    optimiser: optax.GradientTransformation,
    model: LanguageModel,
    moments: PyTree[Any],
    gradients: PyTree[Any],
) -> tuple[LanguageModel, PyTree[Any]]:
    """The model and the optimiser's state after one step of training."""
    parameters = eqx.filter(model, eqx.is_inexact_array)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
        updates, moments = optimiser.update(gradients, moments, parameters)
    return eqx.apply_updates(model, updates), moments


def with_solver(
    model: LanguageModel,
    solver: prnn.AbstractSolver | None,
    adjoint: prnn.AbstractSolver | None = None,
) -> LanguageModel:
    """The same weights, with other solvers for the RNNs and for their derivatives."""
    rnns = [prnn.RNN(b.rnn.cell, solver=solver, adjoint=adjoint) for b in model.residual_blocks()]
    return eqx.tree_at(lambda m: [b.rnn for b in m.residual_blocks()], model, rnns)


def save(path: pathlib.Path, hyperparameters: dict[str, str | int], model: LanguageModel) -> None:
    """Writes one line of JSON, then the arrays. `hyperparameters` are the arguments of
    `LanguageModel` but the key; the solver is not among them, as the weights suit any."""
    with open(path, "wb") as file:
        file.write((json.dumps(hyperparameters) + "\n").encode())
        eqx.tree_serialise_leaves(file, model)


def load(path: pathlib.Path) -> tuple[LanguageModel, dict[str, str | int]]:
    """Reads what `save` wrote: the model, with the default solver, and its hyperparameters."""
    with open(path, "rb") as file:
        hyperparameters = json.loads(file.readline().decode())
        skeleton = eqx.filter_eval_shape(LanguageModel, **hyperparameters, key=jax.random.key(0))
        return eqx.tree_deserialise_leaves(file, skeleton), hyperparameters
