"""Arguments of `solve` from what users pass to the diagnostics: a step, a cell or an `RNN`."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._algebra import AbstractAlgebra
from .._misc import num_steps, struct
from .._solution import Solution
from .._solve import solve
from ..adjoints import AbstractAdjoint
from ..adjoints._wrapped import as_adjoint
from ..cells import AbstractCell
from ..layers import RNN, AbstractLayer
from ..solvers import AbstractSolver
from ..structures import AbstractStructure

AnyRecurrence = Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]] | AbstractCell | RNN


@dataclasses.dataclass(frozen=True)
class SolveArguments:
    """Arguments of [`pararnn.solve`][], and the layer that they come from.

    - `step`, `us`, `init`: the recurrence; of a cell, with its projected inputs.
    - `solver`, `adjoint`, `structure`, `algebra`: from the caller, the layer or the cell, or
        `None`.
    - `layer`, `xs`, `state`: the layer (made of the cell, if a cell was passed), its inputs and its
        initial state; `layer` is `None` for a step function.
    """

    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]
    us: PyTree[Any]
    init: PyTree[Any]
    solver: AbstractSolver | None
    adjoint: AbstractSolver | AbstractAdjoint | None
    structure: AbstractStructure | None
    algebra: AbstractAlgebra | None
    layer: RNN | None
    xs: PyTree[Any]
    state: PyTree[Any]

    def solve(self, step: Any, us: PyTree[Any], init: PyTree[Any], solver, adjoint) -> Solution:
        """Solves the recurrence with the true derivative, without raising at run time."""
        return solve(
            step,
            us,
            init,
            solver=solver,
            adjoint=None if adjoint is None else as_adjoint(adjoint).exact(),
            structure=self.structure,
            algebra=self.algebra,
            throw=False,
        )

    def batched(self, batch_size: int, axis_name: Any = None) -> "SolveArguments":
        """The same for `batch_size` sequences: the inputs rolled along time by further and further.
        The batch axis is behind the time axis."""
        shifts = [i * num_steps(self.us) // batch_size for i in range(batch_size)]

        def roll(x):
            return jnp.stack([jnp.roll(x, shift, 0) for shift in shifts], axis=1)

        def repeat(h):
            return jnp.broadcast_to(h, (batch_size, *h.shape))

        step = jax.vmap(self.step, axis_name=axis_name)
        us, init = jtu.tree_map(roll, self.us), jtu.tree_map(repeat, self.init)
        return dataclasses.replace(self, step=step, us=us, init=init)


def solve_arguments(
    recurrence: Any,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    solver: AbstractSolver | None = None,
    adjoint: AbstractSolver | AbstractAdjoint | None = None,
    structure: AbstractStructure | None = None,
    algebra: AbstractAlgebra | None = None,
    abstract: bool = False,
) -> SolveArguments:
    """Checks that the arguments belong together, and projects the inputs of a cell.

    **Arguments:**

    - `recurrence`, `xs`, `init`: `step, us, init`; or a cell or a layer, with the inputs of the
        layer and the initial state, `None` for its own.
    - `solver`, `adjoint`, `structure`, `algebra`: from the caller.
    - `abstract`: whether shapes and dtypes suffice.
    """
    layer = _as_layer(recurrence)
    xs, init = jtu.tree_map(_to_array, (xs, init))
    if layer is None:
        if init is None:
            raise ValueError(
                "`init` is needed for a step function: the state before the first step. (A cell or "
                "an RNN knows its own: pass that itself instead of its `step`, with its raw `xs`.)"
            )
        return SolveArguments(
            recurrence, xs, init, solver, adjoint, structure, algebra, layer=None, xs=xs, state=init
        )
    if abstract:  # `struct` drops shardings, which only matter when a program runs
        us, start = eqx.filter_eval_shape(_prepare, layer, *struct((xs, init)))
    else:
        us, start = eqx.filter_jit(_prepare)(layer, xs, init)
    cell = layer.cell
    return SolveArguments(
        cell.step,
        us,
        start,
        _only("solver", solver, layer.solver),
        _only("adjoint", adjoint, layer.adjoint),
        cell.structure if structure is None else structure,
        cell.algebra if algebra is None else algebra,
        layer=layer,
        xs=xs,
        state=init,
    )


def check_batch_size(batch_size: Any) -> None:
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            "`batch_size` must be a positive Python int, how many sequences to make of `xs`, or "
            f"None for `xs` alone; got {batch_size!r}."
        )


def _to_array(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def _prepare(layer: RNN, xs: PyTree[Array], state: PyTree[Array] | None) -> Any:
    prepared = layer._prepare(xs, state)
    return prepared.us(layer.cell), prepared.start


def _as_layer(recurrence: Any) -> RNN | None:
    if inspect.isclass(recurrence):
        raise TypeError(
            f"`recurrence` must be a step function, a cell or an RNN; got the class "
            f"{recurrence.__name__}: make an instance of it."
        )
    if isinstance(recurrence, RNN):
        return recurrence
    if isinstance(recurrence, AbstractLayer):
        raise TypeError(
            f"`recurrence` must be one recurrence; got a {type(recurrence).__name__}. Pass an "
            "`RNN` that it holds (the `rnn` of a ResidualBlock), with the inputs of that layer."
        )
    if isinstance(recurrence, (AbstractCell, eqx.nn.GRUCell, eqx.nn.LSTMCell)):
        return RNN(recurrence)
    if not callable(recurrence):
        raise TypeError(
            "`recurrence` must be callable as step(state, x), or a cell, or an RNN; got "
            f"{recurrence!r}."
        )
    return None


def _only(name: str, argument: Any, own: Any) -> Any:
    if argument is not None and own is not None and argument != own:
        raise ValueError(
            f"`{name}` is given twice: the layer has {own!r}, the argument is {argument!r}. Pass "
            "`rnn.cell` to judge the cell with another one."
        )
    return own if argument is None else argument
