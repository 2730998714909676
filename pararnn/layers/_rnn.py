"""Equinox modules that put a cell and a solver together."""

import functools
from typing import Any, Generic, NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from .._checks import (
    StateDtypeError,
    blame_inputs,
    check_adjoint,
    check_flags,
    check_new_state,
    check_projected,
    check_solver,
    check_xs,
    instance_hint,
    to_arrays,
)
from .._devices import mesh_context, typed_slice
from .._line import AxisName, Line
from .._mesh import TimeAxis, both, is_manual, over_devices
from .._misc import num_steps, struct
from .._packing import Packing, passed_inputs, windows_of_pieces, without_moving, zero_unless
from .._select import time_axis
from .._solution import Solution
from .._solve import solve
from .._traits import check_unmasked
from ..adjoints import AbstractAdjoint
from ..cells import AbstractCell, from_equinox
from ..scans import Sequential
from ..scans._named import across
from ..solvers import AbstractSolver, TimeSharded

# Covariant, as a module does not change: an `RNN[GRU]` is an `RNN[AbstractCell]`.
Cell = TypeVar("Cell", bound=AbstractCell, covariant=True)


class _Prepared(NamedTuple):
    """A sequence, ready to be solved: its inputs, what the steps consume, the state to start from,
    the inputs to carry along, the steps that start anew, and how to undo the removal of padding."""

    xs: PyTree[Array]
    us: PyTree[Array]
    start: PyTree[Array]
    past: PyTree[Array] | None
    reset: Bool[Array, " L"] | None
    packing: Packing | None


class RNN(eqx.Module, Generic[Cell]):
    """A recurrent layer: a cell, run over a sequence by a solver.

    One sequence at a time, without a batch axis: use `jax.vmap(rnn)` for batches. The weights are
    the cell's, so a layer trains, filters and serialises as any Equinox module does. For type
    checkers a layer is generic in its cell: `RNN[GRU]`.
    """

    cell: Cell
    learned_state: PyTree[Array] | None
    solver: AbstractSolver | None = eqx.field(static=True)
    adjoint: AbstractSolver | AbstractAdjoint | None = eqx.field(static=True)

    def __init__(
        self,
        cell: Cell | eqx.nn.GRUCell | eqx.nn.LSTMCell,
        solver: AbstractSolver | None = None,
        *,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
    ):
        """**Arguments:**

        - `cell`: the recurrence. A cell of Equinox goes through [`pararnn.from_equinox`][].
        - `solver`, `adjoint`: as for [`pararnn.solve`][]; `None` chooses.
        - `learn_init`: whether the initial state is a parameter, starting from `cell.init_state()`.
        """
        if isinstance(cell, (eqx.nn.GRUCell, eqx.nn.LSTMCell)):
            cell = cast(Cell, from_equinox(cell))
        if not isinstance(cell, AbstractCell):
            raise TypeError(
                f"`cell` must be a pararnn.AbstractCell, or a GRUCell or LSTMCell of equinox.nn; "
                f"got {cell!r}.{instance_hint(cell)}"
            )
        check_solver("solver", solver)
        check_adjoint(adjoint)
        self.cell = cell
        self.learned_state = cell.init_state() if learn_init else None
        self.solver = solver
        self.adjoint = adjoint

    def init_state(self, x: PyTree[Any] | None = None) -> PyTree[Array]:
        """A `state` for the call and for `step` which starts anew, as `None` does: the state of the
        recurrence before the first step, learned if so chosen, else the cell's.

        **Arguments:**

        - `x`: one input, or its `jax.ShapeDtypeStruct`. Only of use for a cell with a `context`,
            whose calls return a pair: with `x` this is such a pair, past inputs of zeros included,
            as a loop needs whose carry may not change its structure (`jax.lax.scan` over `step`).
        """
        state = self._initial()
        if x is None or self.cell.context == 0:
            return state
        return state, self._no_inputs(_stack_one(jtu.tree_map(_zeros_like, x)))

    def _initial(self) -> PyTree[Array]:
        state = self.cell.init_state() if self.learned_state is None else self.learned_state
        if not jtu.tree_leaves(state):
            hint = " Did you forget `return`?" if state is None else ""
            raise ValueError(
                f"`init_state()` of {type(self.cell).__name__} must return the state before the "
                f"first step, with at least one array; got {state!r}.{hint}"
            )
        return state

    def _no_inputs(self, xs: PyTree[Array]) -> PyTree[Array]:
        """What stands for the inputs before the first."""
        return jtu.tree_map(lambda x: jnp.zeros((self.cell.context, *x.shape[1:]), x.dtype), xs)

    def solve(
        self,
        xs: PyTree[Any],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array | np.ndarray, " L"] | None = None,
        mask: Bool[Array | np.ndarray, " L"] | None = None,
        throw: bool = True,
    ) -> Solution:
        """The states of the recurrence with the report of the solver, before the readout. Arguments
        as for calling the layer; `throw` as for [`pararnn.solve`][]."""
        time = self._time(xs)
        if time is not None:

            def solve_part(layer, *args, **options):
                part = layer.solve(*args, throw=throw, **options)
                return part.states, (part.final, part.result, part.stats)

            states, others = self._over_devices(time, solve_part, xs, state, reset, mask)
            return Solution(states, *others)
        prepared = self._prepare(xs, state, reset, mask)
        solution, packing = self._solve(prepared, mask, throw), prepared.packing
        if packing is None:
            return solution
        states = packing.expand(solution.states, prepared.start)
        final = jtu.tree_map(lambda h: h[-1], states)
        return Solution(states, final, solution.result, solution.stats)

    def _solve(self, prepared: _Prepared, mask, throw: bool) -> Solution:
        start, initial = prepared.start, self._initial()
        if struct(jtu.tree_map(jnp.asarray, start)) != struct(initial):
            raise ValueError(
                f"`state` must be shaped like the layer's `init_state()`, {struct(initial)}; got "
                f"{struct(jtu.tree_map(jnp.asarray, start))}."
            )
        if prepared.packing is not None:
            check_unmasked(self.cell.step, start, typed_slice(prepared.us))
        try:
            return solve(
                self.cell.step,
                prepared.us,
                start,
                solver=self.solver,
                adjoint=self.adjoint,
                reset=prepared.reset,
                reset_state=initial,
                mask=mask if prepared.packing is None else None,
                structure=self.cell.structure,
                algebra=self.cell.algebra,
                throw=throw,
            )
        except StateDtypeError as error:
            blame_inputs(error, self.cell, prepared.xs)
            raise

    def _prepare(self, xs, state, reset=None, mask=None) -> _Prepared:
        xs = to_arrays("xs", xs)
        check_xs(xs)
        length, context, line = num_steps(xs), self.cell.context, self._line
        packing, count, pieces = None, length, None
        if reset is not None:
            reset = pieces = check_flags("reset", reset, length)
        if mask is not None:
            mask = check_flags("mask", mask, length)
        if mask is not None and line.is_cut:
            xs, reset = without_moving(line, mask, xs, reset)
        elif mask is not None and length > 0:
            packing = Packing(mask)
            count, xs = packing.count, packing.compact(xs)
            pieces = None if pieces is None else packing.pieces(pieces)
            reset = packing.resets(pieces)
        start, past = self._split(state, xs)
        if context == 0:
            return _Prepared(xs, self._project(xs), start, None, reset, packing)
        if line.is_cut:
            us, past = self._project_part(line, xs, past, reset, mask)
            return _Prepared(xs, us, start, past, reset, packing)
        extended = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), past, xs)
        if pieces is None:
            us = jtu.tree_map(lambda u: u[context:], self._project(extended))
        else:
            piece = jnp.concatenate([jnp.zeros(context, int), jnp.cumsum(pieces)])
            us = self._project_pieces(extended, piece)
            extended = zero_unless(piece == piece[context - 1 + count], extended)
        past = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, count, context), extended)
        return _Prepared(xs, us, start, past, reset, packing)

    def _project_part(self, line, xs, past, reset, mask):
        """What the steps of this device consume, and the last inputs of all; past inputs come from
        other devices."""
        context, length = self.cell.context, num_steps(xs)
        reset = jnp.zeros(length, bool) if reset is None else reset
        piece = across(Sequential(), line).cumulative_sum(reset.astype(int))
        total = line.largest(piece[-1])
        inputs, count, packing = (xs, piece), length, None if mask is None else Packing(mask)
        if packing is not None:
            inputs, count = packing.compact(inputs), packing.count
        held = past, jnp.zeros(context, piece.dtype)
        before, (after, piece_after) = passed_inputs(line, held, inputs, count, context)
        extended, piece = jtu.tree_map(lambda p, x: jnp.concatenate([p, x]), before, inputs)
        us = self._project_pieces(extended, piece)
        if packing is not None:
            places = jnp.maximum(packing.places, 0)
            us = jtu.tree_map(lambda u: u[places], us)
        return us, zero_unless(piece_after == total, after)

    def _project_pieces(self, extended: PyTree[Array], piece: Int[Array, " inputs"]):
        windows = windows_of_pieces(extended, piece, self.cell.context)
        return jtu.tree_map(lambda u: u[:, -1], jax.vmap(self._project)(windows))

    def _time(self, xs: PyTree[Any]) -> TimeAxis | None:
        """Where time is cut, if this is to be run on each device."""
        xs = to_arrays("xs", xs)
        check_xs(xs)
        if num_steps(xs) == 0:
            return None
        time = time_axis(self.solver, self.adjoint, (xs, self))
        return None if time is None or time.mesh is None else time

    def _over_devices(self, time: TimeAxis, run, xs, state, reset, mask):
        """`run(layer, xs, state, reset=..., mask=...)` on each device."""
        # The arrays are an argument: what is closed over keeps types that do not fit there.
        arrays, rest = eqx.partition(self, eqx.is_array)

        def part(cut, whole, real):
            (xs, reset, mask), (arrays, state) = cut, whole
            layer = eqx.combine(arrays, rest)._cut_along(time.axis)
            return run(layer, xs, state, reset=reset, mask=both(mask, real))

        cut, whole = (to_arrays("xs", xs), reset, mask), (arrays, state)
        with mesh_context((cut, whole)):
            return over_devices(time, part, cut, whole)

    def _cut_along(self, axis: AxisName) -> "RNN[Cell]":
        """This layer, which says where time is cut: on each device the inputs do not tell."""
        if any(p is not None and p.axis is not None for p in (self.solver, self.adjoint)):
            return self
        learned = self.learned_state
        new = RNN(
            self.cell, TimeSharded(axis), adjoint=self.adjoint, learn_init=learned is not None
        )
        return new if learned is None else eqx.tree_at(lambda r: r.learned_state, new, learned)

    @property
    def _line(self) -> Line:
        """Where the steps lie that are seen here."""
        policies = [p for p in (self.solver, self.adjoint) if p is not None and p.axis is not None]
        axis = policies[0].axis if policies else None
        return Line(axis if is_manual(axis) else None)

    def _project(self, xs: PyTree[Array]) -> PyTree[Array]:
        us = self.cell.project(xs)
        check_projected(us, num_steps(xs))
        return us

    def _split(self, state, xs: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        """The state of the recurrence and the past inputs, of what a call is given as `state`."""
        context = self.cell.context
        if context == 0:
            return self._initial() if state is None else state, None
        initial, past = self._initial(), self._no_inputs(xs)
        if state is None:
            return initial, past
        # As `init_state()` returns it. No pair of a state and inputs has the state's structure.
        if jtu.tree_structure(state) == jtu.tree_structure(initial):
            return state, past
        if jtu.tree_structure(state) != jtu.tree_structure((initial, past)) or any(
            jnp.shape(a) != jnp.shape(b)
            for a, b in zip(jtu.tree_leaves(state[1]), jtu.tree_leaves(past), strict=True)
        ):
            raise ValueError(
                "`state` must be what the call or the step before returned, here a pair of the "
                f"recurrence's state and the last {context} inputs, or `init_state()`: like "
                f"{eqx.tree_pformat((initial, past))}; got {eqx.tree_pformat(state)}."
            )
        return state

    def __call__(
        self,
        xs: PyTree[Any],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array | np.ndarray, " L"] | None = None,
        mask: Bool[Array | np.ndarray, " L"] | None = None,
        throw: bool = True,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """**Arguments:**

        - `xs`: the inputs, with a leading axis of length `L`.
        - `state`: where to continue, as returned by the call before; `None`, or `init_state()`,
            starts anew.
        - `reset`: a boolean per step; where true, the step starts from `init_state()`, and sees no
            input before its own. For packed sequences: `segment_starts(segment_ids)`.
        - `mask`: a boolean per step; where false, the step is padding, and all goes on as if it
            were not there; its output is zero. For a sequence of some `length`:
            `jnp.arange(L) < length`. A `reset` within padding holds for the next real step.
        - `throw`: raise an error at run time if the solve is not `successful`. What raises is a
            call back to Python, with which a program can be neither exported (`jax.export`) nor
            kept in JAX's persistent cache: pass `throw=False` for these. Nothing then tells a
            failure but the values themselves; `solve(..., throw=False)` returns the report.

        **Returns:**

        `(ys, final)`: the outputs of all steps, and what the next call needs to continue: the state
        after the last step; for a cell with a `context`, a pair of it and the last `context`
        inputs.
        """
        time = self._time(xs)
        if time is not None:
            call_part = functools.partial(type(self).__call__, throw=throw)
            return self._over_devices(time, call_part, xs, state, reset, mask)
        prepared = self._prepare(xs, state, reset, mask)
        solution, packing = self._solve(prepared, mask, throw), prepared.packing
        ys, final = self.cell.readout(solution.states, prepared.us), solution.final
        if packing is not None:
            nothing = jtu.tree_map(lambda y: jnp.zeros(y.shape[1:], y.dtype), ys)
            ys = zero_unless(jnp.asarray(mask), packing.expand(ys, nothing))
            final = packing.last(solution.states, prepared.start)
        elif mask is not None:
            ys = zero_unless(jnp.asarray(mask), ys)
        return ys, final if self.cell.context == 0 else (final, prepared.past)

    def step(
        self, x: PyTree[Any], state: PyTree[Array] | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The streaming form: one input in, one output out.

        Feeding a sequence through `step`, passing each returned state to the next call, gives the
        numbers of the parallel call.

        **Arguments:**

        - `x`: one time slice of the inputs.
        - `state`: as returned by the step, or the call, before; `None`, or `init_state()`, starts
            anew.

        **Returns:**

        `(y, state)`.
        """
        prepared = self._prepare(_stack_one(x), state)
        new = self.cell.step(prepared.start, _unstack_one(prepared.us))
        try:
            check_new_state(new, prepared.start)
        except StateDtypeError as error:
            blame_inputs(error, self.cell, prepared.xs)
            raise
        y = _unstack_one(self.cell.readout(_stack_one(new), prepared.us))
        return y, new if self.cell.context == 0 else (new, prepared.past)


def _stack_one(tree: PyTree[Any]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: jnp.expand_dims(x, 0), tree)


def _unstack_one(tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[0], tree)


def _zeros_like(x: Any) -> Array:
    return jnp.zeros(jnp.shape(x), jnp.result_type(x))
