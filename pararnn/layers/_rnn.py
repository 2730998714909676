"""Equinox modules that put a cell and a solver together."""

import functools
from typing import Any, Generic, TypeVar, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._checked_solve import checked
from .._checks import (
    StateDtypeError,
    blame_inputs,
    blame_slice,
    brief,
    check_adjoint,
    check_new_state,
    check_solver,
    check_xs,
    instance_hint,
    step_hint,
    to_arrays,
)
from .._misc import is_symbolic, num_steps, struct
from .._norms import all_finite
from .._one_device import AxisName, OneDevice
from .._packing import zero_unless
from .._platform import chosen_platform
from .._recurrence import precise
from .._select import time_axis
from .._shards import choose_shards
from .._solution import RESULTS, Solution
from .._solve import solve
from .._step_properties import check_unmasked
from .._tracing import typed_slice
from .._validate import check_positive_int
from ..adjoints import AbstractAdjoint
from ..cells import AbstractCell, from_equinox
from ..sharding._mesh import TimeAxis, both, is_manual, over_devices
from ..sharding._placement import mesh_context
from ..solvers import AbstractSolver, TimeSharded
from ._chunks import apply_chunks, steps_at_once
from ._prepared import Prepared, no_past, prepare
from ._segments import default_size, scan_segments

# Covariant, as a module does not change: an `RNN[GRU]` is an `RNN[AbstractCell]`.
Cell = TypeVar("Cell", bound=AbstractCell, covariant=True)


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
    segment_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        cell: Cell | eqx.nn.GRUCell | eqx.nn.LSTMCell,
        solver: AbstractSolver | None = None,
        *,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
        segment_size: int | None = None,
    ):
        """**Arguments:**

        - `cell`: the recurrence. A cell of Equinox goes through [`pararnn.from_equinox`][].
        - `solver`, `adjoint`: as for [`pararnn.solve`][]; `None` chooses.
        - `learn_init`: whether the initial state is a parameter, starting from `cell.init_state()`.
        - `segment_size`: a call keeps the states of so many steps at once, one segment after
            another, and computes them again for the derivative: memory of
            `L / segment_size + segment_size` states in place of `L`, for a second forward pass.
            `None` chooses: all steps, unless states are matrices or otherwise much larger than
            what a step consumes. A size of `L` or more solves all steps at once, and so does any
            size where `L` is symbolic (`jax.export`).
        """
        if isinstance(cell, (eqx.nn.GRUCell, eqx.nn.LSTMCell)):
            cell = cast(Cell, from_equinox(cell))
        if not isinstance(cell, AbstractCell):
            raise TypeError(
                f"`cell` must be a pararnn.AbstractCell, or a GRUCell or LSTMCell of equinox.nn; "
                f"got {brief(cell)}.{instance_hint(cell) or step_hint(cell)}"
            )
        check_solver("solver", solver)
        check_adjoint(adjoint)
        if segment_size is not None:
            check_positive_int("segment_size", segment_size)
        self.cell = cell
        self.learned_state = cell.init_state() if learn_init else None
        self.solver = solver
        self.adjoint = adjoint
        self.segment_size = segment_size

    def init_state(self, x: PyTree[Any] | None = None) -> PyTree[Array]:
        """A `state` for the call and for `step` which starts anew, as `None` does: the state of the
        recurrence before the first step, learned if so chosen, else the cell's.

        **Arguments:**

        - `x`: one input, or its `jax.ShapeDtypeStruct`. Only of use for a cell with a `context`,
            whose calls return a pair of a state and past inputs: it tells the dtype of these, and
            their shape where the cell does not (`input_struct`). `None` is an input in the dtype
            of the parameters.

        **Returns:**

        What calls return as well, of the same structure, as a loop needs whose carry may not change
        (`jax.lax.scan` over `step`): past inputs of zeros included. Only where nothing tells their
        shape, it is the state of the recurrence alone.
        """
        state = self._initial()
        x = self.cell.input_struct if x is None else x
        if x is None and self.cell.context > 0:
            return state
        past = no_past(self.cell, _stack_one(jtu.tree_map(_zeros_like, x)))
        return state if past is None else (state, past)

    def _initial(self) -> PyTree[Array]:
        state = self.cell.init_state() if self.learned_state is None else self.learned_state
        if not jtu.tree_leaves(state):
            hint = " Did you forget `return`?" if state is None else ""
            raise ValueError(
                f"`init_state()` of {type(self.cell).__name__} must return the state before the "
                f"first step, with at least one array; got {state!r}.{hint}"
            )
        return state

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
        solution = self._solve(prepared, prepared.us(self.cell), mask, throw)
        packing = prepared.packing
        if packing is None:
            return solution
        states = packing.expand(solution.states, prepared.start)
        final = jtu.tree_map(lambda h: h[-1], states)
        return Solution(states, final, solution.result, solution.stats)

    def _check_start(self, start: PyTree[Array]) -> None:
        initial = struct(self._initial())
        if struct(jtu.tree_map(jnp.asarray, start)) != initial:
            raise ValueError(
                f"`state` must be shaped like the layer's `init_state()`, {initial}; got "
                f"{struct(jtu.tree_map(jnp.asarray, start))}."
            )

    def _solve(self, prepared: Prepared, us: PyTree[Array], mask, throw: bool) -> Solution:
        start, initial = prepared.start, self._initial()
        self._check_start(start)
        if prepared.packing is not None:
            check_unmasked(self.cell.step, start, typed_slice(us))
        try:
            return solve(
                self.cell.step,
                us,
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

    def _prepare(self, xs, state, reset=None, mask=None) -> Prepared:
        return prepare(self.cell, self._initial(), self._line, xs, state, reset, mask)

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
            self.cell,
            TimeSharded(axis),
            adjoint=self.adjoint,
            learn_init=learned is not None,
            segment_size=self.segment_size,
        )
        return new if learned is None else eqx.tree_at(lambda r: r.learned_state, new, learned)

    @property
    def _line(self) -> OneDevice:
        """Where the steps lie that are seen here."""
        axes = [p.axis for p in (self.solver, self.adjoint) if p is not None and p.axis is not None]
        return choose_shards(self, axes[0] if axes and is_manual(axes[0]) else None)

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
            `mask_of(length, L)`. A `reset` within padding holds for the next real step.
        - `throw`: raise an error at run time if the solve is not `successful`. What raises is a
            call back to Python, with which a program can be neither exported (`jax.export`) nor
            kept in JAX's persistent cache: pass `throw=False` for these. Nothing then tells a
            failure but the values themselves; `solve(..., throw=False)` returns the report.

        **Returns:**

        `(ys, final)`: the outputs of all steps, and what the next call needs to continue: the state
        after the last step; for a cell with a `context`, a pair of it and the last `context`
        inputs; for one that `sees_starts`, of it and whether there has been an input.
        """
        time = self._time(xs)
        if time is not None:
            call_part = functools.partial(type(self).__call__, throw=throw)
            return self._over_devices(time, call_part, xs, state, reset, mask)
        prepared = self._prepare(xs, state, reset, mask)
        ys, final = self._outputs(prepared, mask, throw)
        packing = prepared.packing
        if packing is not None:
            nothing = jtu.tree_map(lambda y: jnp.zeros(y.shape[1:], y.dtype), ys)
            ys = packing.expand(ys, nothing)
        if mask is not None:
            ys = zero_unless(jnp.asarray(mask), ys)
        return ys, final if prepared.past is None else (final, prepared.past)

    def _outputs(self, prepared: Prepared, mask, throw: bool) -> tuple[Any, Any]:
        """The outputs of what is left without padding, and the last state."""
        length, start, packing = num_steps(prepared.xs), prepared.start, prepared.packing
        chunk_size = self.cell.chunk_size if self._is_chunked(prepared) else None
        size = chunk_size or self._segment_size(prepared)
        if chunk_size is None and size >= length:
            us = prepared.us(self.cell)
            solution = self._solve(prepared, us, mask, throw)
            ys, final = self.cell.readout(solution.states, us), solution.final
            return ys, final if packing is None else packing.last(solution.states, start)
        self._check_start(start)

        def solved(state, us, reset):
            part = prepared._replace(start=state, reset=reset)
            solution = self._solve(part, us, mask, throw=False)
            return solution.final, self.cell.readout(solution.states, us), solution.result

        ways = [(size, solved if chunk_size is None else self._through(self.cell.apply_chunk))]
        if chunk_size is not None and length > chunk_size and self._makes_chunks_at_once:
            at_once = functools.partial(apply_chunks, self.cell)
            ways.insert(0, (steps_at_once(length, chunk_size), self._through(at_once)))
        outputs = scan_segments(
            self.cell,
            ways,
            prepared.given,
            start,
            self._initial(),
            prepared.reset,
            length=length,
            count=None if packing is None else packing.count,
        )
        return checked((outputs.ys, outputs.final), outputs.result, throw)

    def _segment_size(self, prepared: Prepared) -> int:
        length = num_steps(prepared.xs)
        if self._line.is_sharded or is_symbolic(length) or length == 0:
            return length
        if self.segment_size is not None:
            return self.segment_size
        us = eqx.filter_eval_shape(lambda: _unstack_one(prepared.us(self.cell)))
        return default_size(prepared.start, us, length)

    def _is_chunked(self, prepared: Prepared) -> bool:
        """Whether chunks of steps are made at once. They start anew from the cell's own state."""
        length = num_steps(prepared.xs)
        whole = self._line.is_sharded or is_symbolic(length) or length == 0
        anew = self.learned_state is None or prepared.reset is None
        return anew and not whole and self.goes_through_chunks

    @property
    def goes_through_chunks(self) -> bool:
        """Whether a call uses the cell's chunkwise form: not if a solver is asked for."""
        chosen = (self.solver, self.adjoint, self.segment_size)
        return self.cell.chunk_size is not None and all(x is None for x in chosen)

    @property
    def _makes_chunks_at_once(self) -> bool:
        """Whether many chunks are made side by side; a CPU gains nothing by it."""
        return self.cell.chunk_algebra is not None and chosen_platform(None) != "cpu"

    def _through(self, some):
        """`some(state, us, reset)`, which returns state and outputs; and whether all is finite."""

        def through(state, us, reset):
            after, ys = precise(some)(state, us, reset)
            finite = all_finite((after, ys))
            return after, ys, RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite)

        return through

    def step(
        self, x: PyTree[Any], state: PyTree[Array] | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The streaming form: one input in, one output out.

        With each returned state passed to the next call, gives the numbers of the parallel call.

        **Arguments:**

        - `x`: one time slice of the inputs.
        - `state`: as returned by the step, or the call, before; `None`, or `init_state()`, starts
            anew.

        **Returns:**

        `(y, state)`.
        """
        prepared = self._prepare(_stack_one(x), state)
        try:
            us = prepared.us(self.cell)
        except Exception as error:
            blame_slice(error, self.cell, jtu.tree_map(jnp.asarray, x))
            raise
        new = self.cell.step(prepared.start, _unstack_one(us))
        try:
            check_new_state(new, prepared.start)
        except StateDtypeError as error:
            blame_inputs(error, self.cell, prepared.xs)
            raise
        y = _unstack_one(self.cell.readout(_stack_one(new), us))
        return y, new if prepared.past is None else (new, prepared.past)


def _stack_one(tree: PyTree[Any]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: jnp.expand_dims(x, 0), tree)


def _unstack_one(tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[0], tree)


def _zeros_like(x: Any) -> Array:
    return jnp.zeros(jnp.shape(x), jnp.result_type(x))
