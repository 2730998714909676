"""Trained networks, from the weights in `tests/trained`."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import pararnn as prnn

_FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "trained"
_CELLS = {"gru": prnn.GRU, "gru_early": prnn.GRU, "lstm": prnn.LSTM, "elman": prnn.Elman}
_GROUPS = ("gru_s3", "gru_a5")
NAMES = (*_CELLS, *_GROUPS)


class Trained(NamedTuple):
    """A recurrence, as [`pararnn.solve`][] takes it."""

    step: Callable[[Any, Any], Any]
    xs: Any
    init: Any


def load(name: str, length: int, dtype: Any = jnp.float32) -> Trained:
    """A network of `tests/trained` over `length` steps of what it was trained for: text, or words
    in the generators of a group, drawn at random."""
    with np.load(_FOLDER / f"{name}.npz") as file:
        arrays = {key: jnp.asarray(file[key], dtype) for key in file.files}
    if name in _GROUPS:
        return _word_problem(arrays, length)
    with np.load(_FOLDER / "text.npz") as file:
        ids = np.resize(file["ids"], length)
    embedding = arrays.pop("embedding")
    cell = _CELLS[name](
        embedding.shape[1], arrays["weight_h"].shape[1], dtype=dtype, key=jax.random.key(0)
    )
    cell = eqx.tree_at(lambda c: [getattr(c, key) for key in arrays], cell, list(arrays.values()))
    return Trained(cell.step, cell.project(embedding[ids]), cell.init_state())


def _word_problem(arrays: dict[str, Any], length: int) -> Trained:
    fields = {"weight_ih": "ih", "weight_hh": "hh", "bias": "b", "bias_n": "bn"}
    size, inputs = arrays["hh"].shape[1], arrays["E"].shape[1]
    cell = eqx.nn.GRUCell(inputs, size, dtype=arrays["hh"].dtype, key=jax.random.key(0))
    cell = eqx.tree_at(
        lambda c: [getattr(c, key) for key in fields],
        cell,
        [arrays[key] for key in fields.values()],
    )
    letters = jax.random.randint(jax.random.key(1), (length,), 0, len(arrays["E"]))
    return Trained(lambda h, x: cell(x, h), arrays["E"][letters], jnp.zeros(size, cell.bias.dtype))
