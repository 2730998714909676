"""The cells that the example models can be made of, by the names on the command line."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import pararnn as prnn

_float32: Any = jnp.float32
# Of the matrices that a state consists of: 16 rows or columns, with so many features to a head.
_HEAD = 16


def _heads(width: int) -> int:
    return max(1, width // _HEAD)


def _vectors(cell: Callable[..., prnn.AbstractCell]) -> Callable[..., prnn.AbstractCell]:
    """Cells with as many features of states as of inputs."""
    return lambda n, key: cell(n, n, dtype=_float32, key=key)


def _inputs(cell: Callable[..., prnn.AbstractCell]) -> Callable[..., prnn.AbstractCell]:
    """Cells whose states follow from the number of inputs."""
    return lambda n, key: cell(n, dtype=_float32, key=key)


def _matrices(cell: Callable[..., prnn.AbstractCell], **options) -> Callable[..., Any]:
    """Cells with matrices of 16 × 16."""
    return lambda n, key: cell(n, _heads(n), _HEAD, _HEAD, n, dtype=_float32, key=key, **options)


def m2rnn_for_groups(width: int, key: PRNGKeyArray) -> prnn.M2RNN:
    """Heads of 16 x 16 that start as machines rather than as slow averages: recurrent matrices that
    turn the state instead of keeping it, forget gates half open, each step's own letter before the
    convolution blurs it, and keys and values large enough for the tanh to bend."""
    key_cell, key_turn = jax.random.split(key)
    heads = _heads(width)
    cell = prnn.M2RNN(width, heads, _HEAD, _HEAD, width, dtype=_float32, key=key_cell)
    turns = jax.random.orthogonal(key_turn, _HEAD, (heads,), dtype=_float32)
    zeros = jnp.zeros(heads, _float32)
    present = jnp.zeros_like(cell.weight_conv).at[-1].set(1)
    return eqx.tree_at(
        lambda c: (c.weight_h, c.a_log, c.bias_f, c.weight_conv, c.weight_k, c.weight_v),
        cell,
        (turns, zeros, zeros, present, 4 * cell.weight_k, 4 * cell.weight_v),
    )


# From the width of the inputs and outputs and a key to a cell.
CELLS: dict[str, Callable[[int, PRNGKeyArray], prnn.AbstractCell]] = {
    "elman": _vectors(prnn.Elman),
    "gru": _vectors(prnn.GRU),
    "lstm": _vectors(prnn.LSTM),
    "slstm": _vectors(prnn.SLSTM),
    "diagonal-gru": _vectors(prnn.DiagonalGRU),
    "diagonal-lstm": _vectors(prnn.DiagonalLSTM),
    "minmax": _vectors(prnn.MinMax),
    "min-gru": _vectors(prnn.MinGRU),
    "min-lstm": _vectors(prnn.MinLSTM),
    "lru": _vectors(prnn.LRU),
    "rg-lru": _inputs(prnn.RGLRU),
    "s5": _vectors(prnn.S5),
    "s4d": _inputs(prnn.S4D),
    "mamba": _inputs(prnn.SelectiveSSM),
    "lmu": lambda n, key: prnn.LinearLMU(n, n, 16, 64, memory_size=4, dtype=_float32, key=key),
    "m2rnn": m2rnn_for_groups,
    "gla": _matrices(prnn.GatedLinearAttention),
    "retention": _matrices(prnn.Retention),
    "mamba-2": lambda n, key: prnn.Mamba2(
        n, 2 * _heads(n), _HEAD, _HEAD, n, dtype=_float32, key=key
    ),
    "based": lambda n, key: prnn.Based(n, _heads(n), 4, _HEAD, n, dtype=_float32, key=key),
    "mlstm": _matrices(prnn.MLSTM),
    "deltanet": _matrices(prnn.DeltaNet),
    "deltanet-negative": _matrices(prnn.DeltaNet, negative_eigenvalues=True),
    "deltaproduct": _matrices(prnn.DeltaProduct),
    "ttt": _matrices(prnn.TTTLinear),
    "plstm": _matrices(prnn.PLSTM),
    "aaren": _matrices(prnn.Aaren),
    "titans": lambda n, key: prnn.TitansChunked(n, 16, 16, 32, n, dtype=_float32, key=key),
}
