"""Cells of Equinox as they are, with the argument order of this package."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import AbstractCell, check_inputs
from ._parts import at_least_float32, project_gates, zero_state
from ._vector import gru_update, lstm_update

_HiddenCell = tuple[Float[Array, " hidden_size"], Float[Array, " hidden_size"]]


class EquinoxGRU(AbstractCell):
    """An [`equinox.nn.GRUCell`][], its weights untouched. The state is `h`, which is the output."""

    cell: eqx.nn.GRUCell

    def __init__(self, cell: eqx.nn.GRUCell):
        """**Arguments:**

        - `cell`: the cell, with or without biases.
        """
        _check_type(cell, eqx.nn.GRUCell)
        self.cell = cell

    def init_state(self) -> Float[Array, " hidden_size"]:
        return zero_state(self.cell.hidden_size, self.cell.weight_hh)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L hidden_size"]]:
        check_inputs(xs, self.cell.input_size)
        return project_gates(self.cell.weight_ih, self.cell.bias, xs, 3)

    def step(
        self, state: Float[Array, " hidden_size"], u: list[Float[Array, " hidden_size"]]
    ) -> Float[Array, " hidden_size"]:
        hs = jnp.split(at_least_float32(self.cell.weight_hh) @ state, 3)
        return gru_update(state, u, hs, self.cell.bias_n)


class EquinoxLSTM(AbstractCell):
    """An [`equinox.nn.LSTMCell`][], its weights untouched. The state is `(h, c)`, in Equinox's
    order; the output is `h`."""

    cell: eqx.nn.LSTMCell

    def __init__(self, cell: eqx.nn.LSTMCell):
        """**Arguments:**

        - `cell`: the cell, with or without biases.
        """
        _check_type(cell, eqx.nn.LSTMCell)
        self.cell = cell

    def init_state(self) -> _HiddenCell:
        zero = zero_state(self.cell.hidden_size, self.cell.weight_hh)
        return zero, zero

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L hidden_size"]]:
        check_inputs(xs, self.cell.input_size)
        return project_gates(self.cell.weight_ih, self.cell.bias, xs, 4)

    def step(self, state: _HiddenCell, u: list[Float[Array, " hidden_size"]]) -> _HiddenCell:
        h, c = state
        hs = jnp.split(at_least_float32(self.cell.weight_hh) @ h, 4)
        c, h = lstm_update(c, u, hs)
        return h, c

    def readout(self, states: Any, us: Any) -> Float[Array, "L hidden_size"]:
        h, _ = states
        return h


def from_equinox(cell: eqx.nn.GRUCell | eqx.nn.LSTMCell) -> EquinoxGRU | EquinoxLSTM:
    """A cell of Equinox as a cell of this package.

    Its weights stay its own, so trained ones can be taken over and given back:
    `from_equinox(cell).cell` is the cell.

    **Arguments:**

    - `cell`: an [`equinox.nn.GRUCell`][] or an [`equinox.nn.LSTMCell`][].

    **Returns:**

    An [`pararnn.EquinoxGRU`][] or an [`pararnn.EquinoxLSTM`][].

    **Raises:**

    `TypeError` for anything else, subclasses included, whose equations may be others.
    """
    if type(cell) is eqx.nn.GRUCell:
        return EquinoxGRU(cell)
    if type(cell) is eqx.nn.LSTMCell:
        return EquinoxLSTM(cell)
    raise TypeError(
        f"`cell` must be an equinox.nn.GRUCell or an equinox.nn.LSTMCell; got {cell!r}. For other "
        "cells, pass `lambda h, x: cell(x, h)` to pararnn.solve."
    )


def _check_type(cell: Any, expected: type) -> None:
    if type(cell) is not expected:
        raise TypeError(f"`cell` must be an equinox.nn.{expected.__name__}; got {cell!r}.")
