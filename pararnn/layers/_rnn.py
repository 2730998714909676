"""The recurrent layer: a cell, run over a sequence by a solver."""

from typing import Any, Generic, TypeVar, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._checked_solve import checked
from .._checks import (
    StateDtypeError,
    blame_inputs,
    blame_slice,
    brief,
    check_adjoint,
    check_new_state,
    check_solver,
    instance_hint,
    step_hint,
)
from .._misc import is_symbolic, num_steps, struct
from .._one_device import AxisName
from .._packing import zero_unless
from .._solution import Solution
from .._solve import solve
from .._step_properties import check_unmasked
from .._tracing import typed_slice
from .._validate import check_positive_int
from ..adjoints import AbstractAdjoint
from ..cells import AbstractCell, AbstractChunkedCell, from_equinox
from ..solvers import AbstractSolver, TimeSharded
from ._base import AbstractLayer, Flags
from ._chunked import chunk_levels
from ._segmented import default_segment_size, scan_segments
from ._sequence import SequencePlan, check_order, initial_past, plan_sequence
from ._sharded import map_over_shards, named_axis, sharded_axis, shards_of

# Covariant, as a module does not change: an `RNN[GRU]` is an `RNN[AbstractCell]`.
Cell = TypeVar("Cell", bound=AbstractCell, covariant=True)


class RNN(AbstractLayer, Generic[Cell]):
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
        *,
        solver: AbstractSolver | None = None,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
        segment_size: int | None = None,
    ):
        """**Arguments:**

        - `cell`: the recurrence. A cell of Equinox is wrapped by [`pararnn.from_equinox`][].
        - `solver`, `adjoint`: as for [`pararnn.solve`][]; `None` chooses.
        - `learn_init`: make the initial state a parameter, starting from `cell.init_state()`.
        - `segment_size`: checkpoint the states every so many steps and recompute the others for
            the derivative: memory of `L / segment_size + segment_size` states instead of `L`, for
            a second forward pass. `None` chooses: `L`, unless states are matrices or otherwise
            much larger than what a step consumes. With a symbolic `L` (`jax.export`) all states
            are stored.
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
        """The `state` with which a sequence begins, as with `None`: that of the recurrence before
        the first step, learned or the cell's, and for some cells past inputs of zeros.

        It has the structure of what calls return, as a loop needs whose carry may not change
        (`jax.lax.scan` over `step`), unless the shape of past inputs is unknown.

        **Arguments:**

        - `x`: one input, or its `jax.ShapeDtypeStruct`. Only of use for a cell with a `context`,
            whose state holds past inputs: their dtype, and their shape where the cell does not
            tell (`input_struct`). `None` is an input in the dtype of the parameters.
        """
        state = self._initial()
        x = self.cell.input_struct if x is None else x
        if x is None and self.cell.context > 0:
            return state
        zeros = jtu.tree_map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), x)
        past = initial_past(self.cell, _stack_one(zeros))
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

    def __call__(
        self,
        xs: PyTree[Any],
        state: PyTree[Array] | None = None,
        *,
        reset: Flags | None = None,
        mask: Flags | None = None,
        key: PRNGKeyArray | None = None,
        throw: bool = True,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Apply the layer to a whole sequence.

        **Arguments:**

        - `xs`: the inputs, with a leading axis of length `L`.
        - `state`: where to continue, as returned by the call before; `None`, or `init_state()`,
            starts anew.
        - `reset`: a boolean per step; where true, the step starts from `init_state()`, and sees no
            input before its own. For packed sequences: `segment_starts(segment_ids)`.
        - `mask`: a boolean per step; where false, the step is padding: it is skipped, and its
            output is zero. For a sequence of some `length`: `mask_of(length, L)`. A `reset` within
            padding holds for the next real step.
        - `key`: ignored, as there is no dropout; for the interface of all layers.
        - `throw`: raise an error at run time if the solve is not `successful`. This is a call back
            to Python, with which a program can be neither exported (`jax.export`) nor stored in
            JAX's persistent cache: pass `throw=False` for these. Then only the values tell a
            failure; `solve(..., throw=False)` returns the report.

        **Returns:**

        `(ys, state)`: the outputs of all steps, and what the next call needs to continue: the state
        after the last step; for a cell with a `context`, a pair of it and the last `context`
        inputs; for one that `sees_starts`, of it and whether there has been an input.
        """
        time = sharded_axis(self, xs)
        if time is not None:

            def call(layer, *args, **options):
                return layer._on_shard(time.axis)(*args, **options, throw=throw)

            return map_over_shards(self, time, call, xs, state, reset, mask)
        plan = self._prepare(xs, state, reset, mask)
        ys, final = self._outputs(plan, mask, throw)
        if plan.packing is not None:
            nothing = jtu.tree_map(lambda y: jnp.zeros(y.shape[1:], y.dtype), ys)
            ys = plan.packing.expand(ys, nothing)
        if mask is not None:
            ys = zero_unless(jnp.asarray(mask), ys)
        return ys, final if plan.past is None else (final, plan.past)

    def step(
        self, state: PyTree[Array] | None, x: PyTree[Any], *, key: PRNGKeyArray | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The streaming form: one step, with the numbers of the parallel call.

        **Arguments:**

        - `state`: as returned by the step, or the call, before; `None`, or `init_state()`, starts
            anew.
        - `x`: one time slice of the inputs.
        - `key`: ignored, as there is no dropout; for the interface of all layers.

        **Returns:**

        `(y, state)`.

        **Raises:**

        `ValueError` if the arguments are recognisably swapped, or shaped wrongly.
        """
        check_order(self.cell, self._initial(), state, x)
        plan = self._prepare(_stack_one(x), state)
        self._check_start(plan.start)
        try:
            us = plan.us(self.cell)
        except Exception as error:
            blame_slice(error, self.cell, jtu.tree_map(jnp.asarray, x))
            raise
        new = self.cell.step(plan.start, _unstack_one(us))
        try:
            check_new_state(new, plan.start)
        except StateDtypeError as error:
            blame_inputs(error, self.cell, plan.xs)
            raise
        y = _unstack_one(self.cell.readout(_stack_one(new), us))
        return y, new if plan.past is None else (new, plan.past)

    def solve(
        self,
        xs: PyTree[Any],
        state: PyTree[Array] | None = None,
        *,
        reset: Flags | None = None,
        mask: Flags | None = None,
        throw: bool = True,
    ) -> Solution:
        """The states of the recurrence, before the readout, with the report of the solver.
        Arguments as for calling the layer; `throw` as for [`pararnn.solve`][]."""
        time = sharded_axis(self, xs)
        if time is not None:

            def call(layer, *args, **options):
                part = layer._on_shard(time.axis).solve(*args, **options, throw=throw)
                return part.states, (part.final, part.result, part.stats)

            states, others = map_over_shards(self, time, call, xs, state, reset, mask)
            return Solution(states, *others)
        plan = self._prepare(xs, state, reset, mask)
        solution = self._solve(plan, plan.us(self.cell), mask, throw)
        if plan.packing is None:
            return solution
        states = plan.packing.expand(solution.states, plan.start)
        final = jtu.tree_map(lambda h: h[-1], states)
        return Solution(states, final, solution.result, solution.stats)

    @property
    def is_chunkwise(self) -> bool:
        """True if calls use the cell's chunkwise form. They solve for the states instead if a
        solver, an adjoint or a segment size is given."""
        chosen = (self.solver, self.adjoint, self.segment_size)
        return isinstance(self.cell, AbstractChunkedCell) and all(x is None for x in chosen)

    def _prepare(self, xs, state, reset=None, mask=None) -> SequencePlan:
        return plan_sequence(self.cell, self._initial(), shards_of(self), xs, state, reset, mask)

    def _outputs(self, plan: SequencePlan, mask, throw: bool) -> tuple[Any, Any]:
        """The outputs by slot, and the last state."""
        length, packing = num_steps(plan.xs), plan.packing

        def solve_segment(state, us, reset):
            part = plan._replace(start=state, reset=reset)
            solution = self._solve(part, us, mask, throw=False)
            return solution.final, self.cell.readout(solution.states, us), solution.result

        whole = shards_of(self).is_sharded or is_symbolic(length) or length == 0
        # Chunks start anew from the cell's own state, not from a learned one.
        resets_in_chunks = self.learned_state is None or plan.reset is None
        if self.is_chunkwise and resets_in_chunks and not whole:
            assert isinstance(self.cell, AbstractChunkedCell)
            levels = chunk_levels(self.cell, length)
        else:
            size = length if whole else self._segment_size(plan, length)
            levels = [(size, solve_segment)]
            if size >= length:
                us = plan.us(self.cell)
                solution = self._solve(plan, us, mask, throw)
                ys, final = self.cell.readout(solution.states, us), solution.final
                return ys, final if packing is None else packing.last(solution.states, plan.start)
        self._check_start(plan.start)
        outputs = scan_segments(
            self.cell,
            levels,
            plan.inputs,
            plan.start,
            self._initial(),
            plan.reset,
            length=length,
            count=None if packing is None else packing.count,
        )
        return checked((outputs.ys, outputs.final), outputs.result, throw)

    def _segment_size(self, plan: SequencePlan, length: int) -> int:
        if self.segment_size is not None:
            return self.segment_size
        us = eqx.filter_eval_shape(lambda: _unstack_one(plan.us(self.cell)))
        return default_segment_size(plan.start, us, length)

    def _solve(self, plan: SequencePlan, us: PyTree[Array], mask, throw: bool) -> Solution:
        self._check_start(plan.start)
        if plan.packing is not None:
            check_unmasked(self.cell.step, plan.start, typed_slice(us))
        try:
            return solve(
                self.cell.step,
                us,
                plan.start,
                solver=self.solver,
                adjoint=self.adjoint,
                reset=plan.reset,
                reset_state=self._initial(),
                mask=mask if plan.packing is None else None,
                structure=self.cell.structure,
                algebra=self.cell.algebra,
                throw=throw,
            )
        except StateDtypeError as error:
            blame_inputs(error, self.cell, plan.xs)
            raise

    def _check_start(self, start: PyTree[Array]) -> None:
        initial, got = struct(self._initial()), struct(jtu.tree_map(jnp.asarray, start))
        if got != initial:
            raise ValueError(
                f"`state` must be shaped like `init_state()` of the layer, {initial}; got {got}."
            )

    def _on_shard(self, axis: AxisName) -> "RNN[Cell]":
        """This layer, with a solver that names the sharded axis: on a device the inputs no longer
        tell that they are sharded."""
        if named_axis(self) is not None:
            return self
        learned = self.learned_state
        new = RNN(
            self.cell,
            solver=TimeSharded(axis),
            adjoint=self.adjoint,
            learn_init=learned is not None,
            segment_size=self.segment_size,
        )
        return new if learned is None else eqx.tree_at(lambda r: r.learned_state, new, learned)


def _stack_one(tree: PyTree[Any]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: jnp.expand_dims(x, 0), tree)


def _unstack_one(tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[0], tree)
