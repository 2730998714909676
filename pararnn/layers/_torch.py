"""Networks with the weights of PyTorch's, without PyTorch itself."""

import re
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..adjoints import AbstractAdjoint
from ..cells import GRU, LSTM, AbstractCell, Elman
from ..solvers import AbstractSolver
from ._rnn import RNN
from ._stack import Bidirectional, Stack

_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)_l(0|[1-9][0-9]*)(_reverse)?")
# By the blocks of rows that the weights have for each hidden unit.
_KINDS = {1: "RNN", 3: "GRU", 4: "LSTM"}
_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    solver: AbstractSolver | None = None,
    adjoint: AbstractSolver | AbstractAdjoint | None = None,
    nonlinearity: str = "tanh",
) -> Stack:
    """A stack of layers with the weights of a `torch.nn.LSTM`, `torch.nn.GRU` or `torch.nn.RNN`.

    Any number of layers, in one direction or both, with biases or without. The weights are copied
    into [`pararnn.LSTM`][], [`pararnn.GRU`][] or [`pararnn.Elman`][] cells and keep their dtype
    (float64 needs JAX's `jax_enable_x64`, without which they become float32, as all arrays do).
    Where PyTorch adds two biases the cell has their sum; where it has none, zeros. What the weights
    do not hold is up to you: sequences have no batch axis here, whatever `batch_first` said, and
    there is no dropout between the layers.

    **Arguments:**

    - `state_dict`: the names of PyTorch with an array for each, such as `module.state_dict()` or
        what was saved of it: whatever `numpy.asarray` takes, tensors on the CPU among them.
    - `solver`, `adjoint`: as for [`pararnn.solve`][], for all layers; `None` chooses.
    - `nonlinearity`: of a `torch.nn.RNN`, `"tanh"` or `"relu"`. Its weights do not tell.

    **Returns:**

    A [`pararnn.Stack`][] of one [`pararnn.RNN`][] per layer or, if the network reads both ways, of
    one [`pararnn.Bidirectional`][]. The state of an LSTM layer is `(c, h)`, that of the others `h`.

    **Raises:**

    `ValueError` or `TypeError` naming the entry that is missing, unknown or of a wrong shape or
    dtype. Projections (`proj_size`) are refused.
    """
    if nonlinearity not in _ACTIVATIONS:
        raise ValueError(f"`nonlinearity` must be 'tanh' or 'relu'; got {nonlinearity!r}.")
    entries = _read(state_dict)
    num_layers, suffixes, parts = _names(entries)
    gates, hidden_size = _sizes(entries)
    if nonlinearity != "tanh" and gates != 1:
        raise ValueError(
            f"`nonlinearity` is for the weights of a torch.nn.RNN; got {nonlinearity!r} for those "
            f"of a torch.nn.{_KINDS[gates]}."
        )
    layers, inputs = [], None
    for number in range(num_layers):
        rnns = []
        for suffix in suffixes:
            weights = {part: f"{part}_l{number}{suffix}" for part in parts}
            inputs = _check_shapes(entries, weights, gates, hidden_size, inputs)
            arrays = {part: entries[name] for part, name in weights.items()}
            cell = _cell(arrays, gates, hidden_size, nonlinearity)
            rnns.append(RNN(cell, solver=solver, adjoint=adjoint))
        layers.append(Bidirectional(*rnns) if len(rnns) == 2 else rnns[0])
        inputs = hidden_size * len(rnns)
    return Stack(layers)


# --- reading ----------------------------------------------------------------------------------


def _read(state_dict: Any) -> dict[str, Array]:
    """All entries as arrays of floating-point numbers of one dtype."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "`state_dict` must be a mapping from names to arrays, as `module.state_dict()` gives; "
            f"got {state_dict!r}."
        )
    if not state_dict:
        raise ValueError("`state_dict` must hold the weights of a network; got an empty mapping.")
    for name in state_dict:
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[0].startswith("bias_hr"):
            raise ValueError(
                f"`state_dict` has the unknown entry {name!r}; the names must be those of a "
                "torch.nn.LSTM, GRU or RNN, such as 'weight_ih_l0'. If it is a part of a larger "
                "model, pass its own entries without the prefix, as `model.part.state_dict()` has "
                "them."
            )
        if match[2] == "hr":
            raise ValueError(
                f"`state_dict` has the entry {name!r}: an LSTM with projections (`proj_size`) is "
                "not supported."
            )
    entries = {name: _array(name, value) for name, value in state_dict.items()}
    (first, reference), *others = entries.items()
    for name, value in others:
        if value.dtype != reference.dtype:
            raise ValueError(
                f"`state_dict` must have one dtype; got {value.dtype} for {name!r} and "
                f"{reference.dtype} for {first!r}."
            )
    return entries


def _array(name: str, value: Any) -> Array:
    if not isinstance(value, jax.Array):
        try:
            value = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # as tensors say it
            raise TypeError(
                f"`state_dict[{name!r}]` cannot be read by numpy.asarray: {error} Pass tensors "
                "without gradient, on the CPU (`tensor.detach().cpu()`), and those of bfloat16 as "
                "float32 (`tensor.float()`)."
            ) from error
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"`state_dict[{name!r}]` must hold real floating-point numbers; got {value.dtype}."
        )
    # A copy: the memory of a tensor may change, if its owner goes on training.
    return jnp.array(value)


def _names(entries: Mapping[str, Any]) -> tuple[int, list[str], list[str]]:
    """The number of layers, the suffix of each direction's names, and their prefixes."""
    matches = [match for match in map(_NAME.fullmatch, entries) if match]
    num_layers = 1 + max(int(match[3]) for match in matches)
    suffixes = ["", "_reverse"] if any(match[4] for match in matches) else [""]
    parts = ["weight_ih", "weight_hh"]
    if any(match[1] == "bias" for match in matches):
        parts += ["bias_ih", "bias_hh"]

    names = (f"{p}_l{n}{s}" for n in range(num_layers) for s in suffixes for p in parts)
    missing = next((name for name in names if name not in entries), None)
    if missing is not None:
        raise ValueError(
            f"`state_dict` lacks the entry {missing!r}; it has {', '.join(sorted(entries))}."
        )
    return num_layers, suffixes, parts


def _sizes(entries: Mapping[str, Array]) -> tuple[int, int]:
    """The number of gates and of hidden units."""
    shape = entries["weight_hh_l0"].shape
    if len(shape) == 2 and shape[1] > 0 and shape[0] % shape[1] == 0:
        gates, hidden_size = shape[0] // shape[1], shape[1]
        if gates in _KINDS:
            return gates, hidden_size
    hint = ""
    if len(shape) == 2 and shape[0] % 4 == 0 and 0 < shape[1] < shape[0] // 4:
        hint = (
            " That of an LSTM with projections (`proj_size`) is as narrow; such a network, whose "
            "'weight_hr_l0' this lacks, is not supported."
        )
    raise ValueError(
        "`state_dict['weight_hh_l0']` must have the shape (gates * hidden_size, hidden_size), with "
        f"4 gates for an LSTM, 3 for a GRU, 1 for an RNN; got {shape}.{hint}"
    )


def _check_shapes(
    entries: Mapping[str, Array],
    names: Mapping[str, str],
    gates: int,
    hidden_size: int,
    input_size: int | None,
) -> int:
    """Raises unless one layer has its shapes; returns how many inputs it has. `None` allows any."""
    rows = gates * hidden_size
    got = entries[names["weight_ih"]].shape
    if input_size is None and len(got) == 2 and got[1] > 0:
        input_size = got[1]
    shapes = {"weight_ih": (rows, input_size), "weight_hh": (rows, hidden_size)}
    for part, name in names.items():
        expected, shape = shapes.get(part, (rows,)), entries[name].shape
        if shape != expected:
            wanted = str(expected).replace("None", "input_size")
            raise ValueError(
                f"`state_dict[{name!r}]` must have the shape {wanted}, as this is a layer of a "
                f"torch.nn.{_KINDS[gates]} with {hidden_size} hidden units; got {shape}."
            )
    assert input_size is not None
    return input_size


# --- cells ------------------------------------------------------------------------------------


def _cell(
    weights: Mapping[str, Array], gates: int, hidden_size: int, nonlinearity: str
) -> AbstractCell:
    """One layer in one direction. The blocks of rows are in the order of the cells here: i, f, g, o
    for the LSTM; r, z, n for the GRU."""
    weight_x, weight_h = weights["weight_ih"], weights["weight_hh"]
    zero = jnp.zeros(gates * hidden_size, weight_h.dtype)
    bias, bias_h = weights.get("bias_ih", zero), weights.get("bias_hh", zero)
    input_size = weight_x.shape[1]
    if gates == 3:
        # The reset gate acts on the bias of n, too; those of r and z are merely added.
        bias_n = bias_h[2 * hidden_size :]
        bias = bias + bias_h.at[2 * hidden_size :].set(0)
        new = {"weight_x": weight_x, "weight_h": weight_h, "bias": bias, "bias_n": bias_n}
        return _fill(GRU, input_size, hidden_size, new)
    new = {"weight_x": weight_x, "weight_h": weight_h, "bias": bias + bias_h}
    if gates == 4:
        return _fill(LSTM, input_size, hidden_size, new)
    return _fill(Elman, input_size, hidden_size, new, activation=_ACTIVATIONS[nonlinearity])


def _fill(
    cell: type[Elman] | type[GRU] | type[LSTM],
    input_size: int,
    hidden_size: int,
    weights: Mapping[str, Array],
    **options: Any,
) -> AbstractCell:
    """A cell with these weights instead of random ones, which are not even drawn."""
    key = jax.random.key(0)
    skeleton = eqx.filter_eval_shape(cell, input_size, hidden_size, **options, key=key)
    return eqx.tree_at(
        lambda c: [getattr(c, name) for name in weights], skeleton, list(weights.values())
    )
