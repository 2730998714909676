"""The kernel: its block of chunks, its loop over time, which rows it reads and writes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..jaxprs._moves import positions
from . import _pallas
from ._layout import Writer, stretched
from ._plan import Plan, flat_carry, from_segments
from ._program import Program
from ._tiles import Span, Tile, default_axis, lanes_of

# Weights up to this size stay in registers from step to step, where the matrix units (of eight
# warps) take them or do not; larger ones are loaded in each. By what compiles without spilling.
_KEPT_BY_UNITS, _KEPT_BYTES = 96 * 1024, 16 * 1024
_BYTES_OF_A_WARP = 12 * 1024
# How many elements of a product a thread may hold, where it is not left to the matrix units.
_HELD = 32
# How many elements of the carry and the inputs a thread holds at most, if more threads help.
_CARRIED = 12
# How many steps' inputs are loaded while as many steps are computed: a load takes longer than an
# elementwise step. By what a thread can hold of them, and by what compiles in a few seconds.
_AHEAD, _HELD_AHEAD, _OPERATIONS_AHEAD = 4, 24, 800
# So many programs fill a large device.
_ENOUGH_PROGRAMS = 264


class Geometry(NamedTuple):
    """Which steps there are; see `fused_sweep`."""

    num_chunks: int
    length: int
    num_steps: int
    stride: int
    first: int
    keep: bool
    reverse: bool


class Kernel:
    """A kernel for a block of chunks, as a function of references."""

    def __init__(self, program: Program, plan: Plan, geometry: Geometry, interpret: bool):
        self.program, self.plan, self.geometry, self.interpret = program, plan, geometry, interpret
        self.rows, self.warps = _block(plan, geometry.num_chunks)
        self.programs = -(-geometry.num_chunks // self.rows)
        self.num_indexed = len(program.carry) + len(program.inputs)
        self.inputs = plan.inputs
        self.all_kept = _fit(plan)
        self.kept = [*plan.vectors, *(plan.matrices if self.all_kept else ())]
        self.ahead = self._steps_ahead()

    def _steps_ahead(self) -> int:
        """How many steps' inputs are under way; none where products need the registers."""
        lanes = self.rows * sum(lanes_of(*span.widths) for span in self.inputs)
        few = _AHEAD * lanes <= _HELD_AHEAD * 32 * self.warps
        short = _AHEAD * self.plan.operations <= _OPERATIONS_AHEAD
        if self.plan.matrices or not (few and short) or self.geometry.num_steps < 2 * _AHEAD:
            return int(self.all_kept)
        return _AHEAD

    def results(self) -> list[jax.ShapeDtypeStruct]:
        """Of all ends, then of all states if they are kept; booleans as bytes."""
        rows = [self.geometry.num_chunks, *([self.geometry.length] if self.geometry.keep else [])]
        return [
            jax.ShapeDtypeStruct((n, int(np.prod(leaf.shape, dtype=int))), _held(leaf.dtype))
            for n in rows
            for leaf in self.program.carry
        ]

    def __call__(self, *refs: Any) -> None:
        _Run(self, refs).run()


class _Run:
    """The work of one program."""

    def __init__(self, kernel: Kernel, refs: Sequence[Any]):
        self.kernel, self.program, self.plan = kernel, kernel.program, kernel.plan
        self.geometry = kernel.geometry
        counts = [len(self.program.carry), len(self.program.inputs), len(self.program.constants())]
        bounds = np.cumsum([0, *counts, 1, counts[0]])
        parts = [refs[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        self.starts, inputs, constants, (once,), self.ends = parts
        self.once = once[0, 0]
        self.states = refs[bounds[-1] :]
        self.stored = {("input", k): ref for k, ref in enumerate(inputs)}
        self.stored |= {("constant", k): ref for k, ref in enumerate(constants)}
        self.chunk = _pallas.program_rows(kernel.rows)

    def run(self) -> None:
        carry = self._first_carry()
        kept = {span: self._load(span, np.int32(0)) for span in self.kernel.kept}
        steps, ahead = self.geometry.num_steps, self.kernel.ahead
        group = max(ahead, 1)

        def loaded(first):
            return [self._inputs_at(first + np.int32(j)) for j in range(ahead)]

        def some(first, carry, inputs, count):
            for j in range(count):
                i = first + np.int32(j)
                carry = self._step(i, carry, inputs[j] if ahead else self._inputs_at(i), kept)
            return carry

        def turn(n, arrays):
            carry, inputs = arrays
            first = n * np.int32(group)
            following = loaded(first + np.int32(group))
            return some(first, carry, inputs, group), following

        turns, inputs = steps // group, loaded(np.int32(0))
        if turns > 1:
            stop = np.int32(turns)
            carry, inputs = lax.fori_loop(np.int32(0), stop, turn, (carry, inputs))
            carry = some(np.int32(turns * group), carry, inputs, steps % group)
        else:
            carry = some(np.int32(0), carry, inputs, steps)
        self._write(self.ends, self.chunk, carry, self.chunk < self.geometry.num_chunks)

    def _step(self, i, carry, inputs, kept):
        loaded = dict(zip(self.kernel.inputs, inputs, strict=True)) | kept

        def load(span, dtype):
            found = loaded.get(span)
            return self._load(span, np.int32(0)) if found is None else found

        def product(vectors, span, dtype):
            vectors = stretched(vectors, (self.kernel.rows, vectors.shape[1]))
            if span in kept:
                return _pallas.product(vectors, kept[span], self.kernel.interpret)
            return self._product_apart(vectors, span)

        writer = Writer(self.plan.cuts, load, self.kernel.rows, product)
        arrays = iter(carry)
        values = [
            from_segments(leaf, self.plan.cuts, lambda low, high: Tile(next(arrays), high - low))
            for leaf in self.program.carry
        ]
        carry = flat_carry(writer, self.program, values)
        if self.geometry.keep:
            self._keep(i, carry)
        return carry

    def _product_apart(self, vectors, span):
        """A product in a loop of one turn, of which the compiler does not know that it is one: it
        would load the blocks of all products first, for which there are not enough registers."""

        def turn(i, total):
            block = self._load(span, i)
            # The same numbers; prepared in the loop, not ahead of it for all products.
            here = jnp.where(i == 0, vectors, lax.full(vectors.shape, 0, vectors.dtype))
            return total + _pallas.product(here, block, self.kernel.interpret)

        dtype = _pallas.sum_dtype(vectors.dtype, self.plan.spans[span])
        total = lax.full((self.kernel.rows, lanes_of(span.widths[1])), 0, dtype)
        return lax.fori_loop(np.int32(0), self.once, turn, total)

    # --- memory ---------------------------------------------------------------------------------

    def _first_carry(self) -> list[jax.Array]:
        row = jnp.minimum(self.chunk, np.int32(self.geometry.num_chunks - 1))
        arrays = []
        for k, start, width in self._tiles():
            leaf = self.program.carry[k]
            span = Span(("start", k), start, (self._lane_step(k),), (width,))
            arrays.append(_pallas.load(self.starts[k], row, span).astype(leaf.dtype))
        return arrays

    def _inputs_at(self, i: Any) -> list[jax.Array]:
        """What the step `i` consumes, in the block's chunks; one row if they share it."""
        row, last = self._row(i), np.int32(self.geometry.length - 1)
        row = jnp.clip(row, np.int32(0), last)
        row = last - row if self.geometry.reverse else row
        return [self._load(span, row) for span in self.kernel.inputs]

    def _row(self, i: Any) -> Any:
        first = i + np.int32(self.geometry.first)
        stride = self.geometry.stride
        return first + self.chunk * np.int32(stride) if stride else first

    def _load(self, span: Span, row: Any) -> jax.Array:
        array = _pallas.load(self.stored[span.source], row, span)
        return array.astype(self.plan.spans[span])

    def _keep(self, i, carry) -> None:
        row, length = self._row(i), np.int32(self.geometry.length)
        valid = (self.chunk < self.geometry.num_chunks) & (row < length)
        row = length - 1 - row if self.geometry.reverse else row
        self._write(self.states, jnp.where(valid, row, length), carry, valid)

    def _write(self, refs, row, carry, valid) -> None:
        for (k, start, width), array in zip(self._tiles(), carry, strict=True):
            array = array.astype(_held(array.dtype))
            step = self._lane_step(k)
            _pallas.store(refs[k], row, Span(("end", k), start, (step,), (width,)), array, valid)

    def _tiles(self) -> Iterator[tuple[int, int, int]]:
        """Of all tiles of the carry: which leaf, where in it, and how many lanes."""
        for k, leaf in enumerate(self.program.carry):
            index = positions(leaf.shape or (1,))
            index = np.moveaxis(index, default_axis(leaf.shape), -1)
            for lead in np.ndindex(index.shape[:-1]):
                for low, high in self.plan.cuts.segments(index.shape[-1]):
                    yield k, int(index[lead][low]), high - low

    def _lane_step(self, k: int) -> int:
        """How far apart neighbouring lanes lie in memory."""
        shape = self.program.carry[k].shape
        return int(np.prod(shape[default_axis(shape) + 1 :], dtype=int))


def _held(dtype: Any) -> Any:
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


def _weight_bytes(plan: Plan) -> int:
    return sum(_block_size(span) * plan.spans[span].itemsize for span in plan.matrices)


def _fit(plan: Plan) -> bool:
    """Whether all weights stay in registers."""
    return _weight_bytes(plan) <= (_KEPT_BY_UNITS if _uses_units(plan) else _KEPT_BYTES)


def _block_size(span: Span) -> int:
    return math.prod(map(lanes_of, span.widths))


def _uses_units(plan: Plan) -> bool:
    """Whether any product is left to the matrix units."""
    return any(
        _pallas.by_units(lanes_of(span.widths[0]), lanes_of(span.widths[1]), plan.spans[span])
        for span in plan.matrices
    )


def _block(plan: Plan, num_chunks: int) -> tuple[int, int]:
    """How many chunks a program has, and how many warps."""
    if _uses_units(plan):
        return _pallas.ROWS, 8
    if plan.matrices:
        largest = max(_block_size(span) for span in plan.matrices)
        warps = -(-_weight_bytes(plan) // _BYTES_OF_A_WARP) if _fit(plan) else 4
        warps = max(warps, largest // (32 * _HELD))
        rows = max(1, warps * 32 * _HELD // (2 * largest))
    else:
        rows, warps = _elementwise_block(max(plan.lanes), num_chunks)
    # What all tiles of the carry and the inputs take of a thread.
    row = sum(plan.lanes) + sum(lanes_of(*span.widths) for span in plan.inputs)
    while rows > 1 and rows * row > warps * 32 * _CARRIED:
        rows //= 2
    # Threads of which tiles have no elements left do not help.
    while 32 * warps < min(512, rows * max(plan.lanes)) and rows * row > warps * 32 * _CARRIED:
        warps *= 2
    return min(rows, 1 << (num_chunks - 1).bit_length()), warps


def _elementwise_block(lanes: int, num_chunks: int) -> tuple[int, int]:
    """About one element for each thread, unless there are too few programs to fill a device."""
    for warps in (4, 2):
        rows = max(1, warps * 32 // lanes)
        if -(-num_chunks // rows) >= _ENOUGH_PROGRAMS:
            return rows, warps
    return max(1, 32 // lanes), 1
