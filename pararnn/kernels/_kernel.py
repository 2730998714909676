"""The kernel: its block of chunks, its loop over time, and the rows that it reads and writes."""

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

# Weights of at most this many bytes stay in registers for all steps, with and without the matrix
# units; larger ones are loaded at every step. The largest sizes that compile without spilling.
_RESIDENT_BYTES_UNITS, _RESIDENT_BYTES = 96 * 1024, 16 * 1024
_BYTES_OF_A_WARP = 12 * 1024
# The most elements of a product per thread, where the matrix units do not multiply.
_PRODUCT_ELEMENTS = 32
# The most elements of the carry and the inputs per thread, as long as more threads can share them.
_CARRY_ELEMENTS = 12
# The inputs of this many steps are prefetched, as a load takes longer than an elementwise step: up
# to so many elements per thread, and so many operations, which compile in a few seconds.
_PREFETCH, _PREFETCH_ELEMENTS, _PREFETCH_OPERATIONS = 4, 24, 800
# The number of programs that fill a large device.
_FULL_GRID = 264


class Geometry(NamedTuple):
    """The steps of each chunk, as the arguments of `fused_sweep`."""

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
        self.all_resident = _weights_fit(plan)
        self.resident = [*plan.vectors, *(plan.matrices if self.all_resident else ())]
        self.prefetched = self._prefetched_steps()

    def _prefetched_steps(self) -> int:
        """The number of steps whose inputs are prefetched; 0 if weights stay in memory."""
        lanes = self.rows * sum(lanes_of(*span.widths) for span in self.inputs)
        few = _PREFETCH * lanes <= _PREFETCH_ELEMENTS * 32 * self.warps
        short = _PREFETCH * self.plan.operations <= _PREFETCH_OPERATIONS
        if self.plan.matrices or not (few and short) or self.geometry.num_steps < 2 * _PREFETCH:
            return int(self.all_resident)
        return _PREFETCH

    def results(self) -> list[jax.ShapeDtypeStruct]:
        """The ends, then the states if they are returned, as matrices; booleans as bytes."""
        rows = [self.geometry.num_chunks, *([self.geometry.length] if self.geometry.keep else [])]
        return [
            jax.ShapeDtypeStruct((n, int(np.prod(leaf.shape, dtype=int))), _in_memory(leaf.dtype))
            for n in rows
            for leaf in self.program.carry
        ]

    def __call__(self, *refs: Any) -> None:
        _Run(self, refs).run()


class _Run:
    """One program of the grid."""

    def __init__(self, kernel: Kernel, refs: Sequence[Any]):
        self.kernel, self.program, self.plan = kernel, kernel.program, kernel.plan
        self.geometry = kernel.geometry
        counts = [len(self.program.carry), len(self.program.inputs), len(self.program.constants())]
        bounds = np.cumsum([0, *counts, 1, counts[0]])
        parts = [refs[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        self.starts, inputs, constants, (one,), self.ends = parts
        self.one = one[0, 0]
        self.states = refs[bounds[-1] :]
        self.stored = {("input", k): ref for k, ref in enumerate(inputs)}
        self.stored |= {("constant", k): ref for k, ref in enumerate(constants)}
        self.chunk = _pallas.program_rows(kernel.rows)

    def run(self) -> None:
        carry = self._first_carry()
        resident = {span: self._load(span, np.int32(0)) for span in self.kernel.resident}
        steps, prefetched = self.geometry.num_steps, self.kernel.prefetched
        group = max(prefetched, 1)

        def loaded(first):
            return [self._inputs_at(first + np.int32(j)) for j in range(prefetched)]

        def some(first, carry, inputs, count):
            for j in range(count):
                i = first + np.int32(j)
                carry = self._step(
                    i, carry, inputs[j] if prefetched else self._inputs_at(i), resident
                )
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

    def _step(self, i, carry, inputs, resident):
        loaded = dict(zip(self.kernel.inputs, inputs, strict=True)) | resident

        def load(span, dtype):
            found = loaded.get(span)
            return self._load(span, np.int32(0)) if found is None else found

        def product(vectors, span, dtype):
            vectors = stretched(vectors, (self.kernel.rows, vectors.shape[1]))
            if span in resident:
                return _pallas.product(vectors, resident[span], self.kernel.interpret)
            return self._unhoisted_product(vectors, span)

        writer = Writer(self.plan.cuts, load, self.kernel.rows, product)
        arrays = iter(carry)
        values = [
            from_segments(leaf, self.plan.cuts, lambda low, high: Tile(next(arrays), high - low))
            for leaf in self.program.carry
        ]
        carry = flat_carry(writer, self.program, values)
        if self.geometry.keep:
            self._store_states(i, carry)
        return carry

    def _unhoisted_product(self, vectors, span):
        """A product inside a loop with one iteration, whose trip count is read from memory so that
        Triton cannot unroll it. Otherwise Triton hoists the loads of all products to the front, and
        spills registers (JAX 0.10.2). `make gpu-check` counts spills: this can go when there are
        none without it."""

        def turn(i, total):
            block = self._load(span, i)
            # Equal to `vectors`, but not loop-invariant: their layout is converted in the loop.
            here = jnp.where(i == 0, vectors, lax.full(vectors.shape, 0, vectors.dtype))
            return total + _pallas.product(here, block, self.kernel.interpret)

        dtype = _pallas.sum_dtype(vectors.dtype, self.plan.spans[span])
        total = lax.full((self.kernel.rows, lanes_of(span.widths[1])), 0, dtype)
        return lax.fori_loop(np.int32(0), self.one, turn, total)

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
        """The inputs of step `i` of all chunks of the block; one row if the chunks share them."""
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

    def _store_states(self, i, carry) -> None:
        row, length = self._row(i), np.int32(self.geometry.length)
        valid = (self.chunk < self.geometry.num_chunks) & (row < length)
        row = length - 1 - row if self.geometry.reverse else row
        self._write(self.states, jnp.where(valid, row, length), carry, valid)

    def _write(self, refs, row, carry, valid) -> None:
        for (k, start, width), array in zip(self._tiles(), carry, strict=True):
            array = array.astype(_in_memory(array.dtype))
            step = self._lane_step(k)
            _pallas.store(refs[k], row, Span(("end", k), start, (step,), (width,)), array, valid)

    def _tiles(self) -> Iterator[tuple[int, int, int]]:
        """For each tile of the carry: its leaf, its first element there, its number of lanes."""
        for k, leaf in enumerate(self.program.carry):
            index = positions(leaf.shape or (1,))
            index = np.moveaxis(index, default_axis(leaf.shape), -1)
            for lead in np.ndindex(index.shape[:-1]):
                for low, high in self.plan.cuts.segments(index.shape[-1]):
                    yield k, int(index[lead][low]), high - low

    def _lane_step(self, k: int) -> int:
        """The distance of neighbouring lanes in memory."""
        shape = self.program.carry[k].shape
        return int(np.prod(shape[default_axis(shape) + 1 :], dtype=int))


def _in_memory(dtype: Any) -> Any:
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


def _weight_bytes(plan: Plan) -> int:
    return sum(_block_size(span) * plan.spans[span].itemsize for span in plan.matrices)


def _weights_fit(plan: Plan) -> bool:
    """Whether all weights fit into registers."""
    return _weight_bytes(plan) <= (_RESIDENT_BYTES_UNITS if _uses_units(plan) else _RESIDENT_BYTES)


def _block_size(span: Span) -> int:
    return math.prod(map(lanes_of, span.widths))


def _uses_units(plan: Plan) -> bool:
    """Whether the matrix units compute any product."""
    return any(
        _pallas.by_units(lanes_of(span.widths[0]), lanes_of(span.widths[1]), plan.spans[span])
        for span in plan.matrices
    )


def _block(plan: Plan, num_chunks: int) -> tuple[int, int]:
    """The numbers of chunks and warps of a program."""
    if _uses_units(plan):
        return _pallas.ROWS, 8
    if plan.matrices:
        largest = max(_block_size(span) for span in plan.matrices)
        warps = -(-_weight_bytes(plan) // _BYTES_OF_A_WARP) if _weights_fit(plan) else 4
        warps = max(warps, largest // (32 * _PRODUCT_ELEMENTS))
        rows = max(1, warps * 32 * _PRODUCT_ELEMENTS // (2 * largest))
    else:
        rows, warps = _elementwise_block(max(plan.lanes), num_chunks)
    # Elements of the carry and the inputs, for one chunk.
    row = sum(plan.lanes) + sum(lanes_of(*span.widths) for span in plan.inputs)
    while rows > 1 and rows * row > warps * 32 * _CARRY_ELEMENTS:
        rows //= 2
    # No more threads than the largest tile has elements.
    while (
        32 * warps < min(512, rows * max(plan.lanes)) and rows * row > warps * 32 * _CARRY_ELEMENTS
    ):
        warps *= 2
    return min(rows, 1 << (num_chunks - 1).bit_length()), warps


def _elementwise_block(lanes: int, num_chunks: int) -> tuple[int, int]:
    """About one element per thread; fewer warps if there were too few programs to fill a device."""
    for warps in (4, 2):
        rows = max(1, warps * 32 // lanes)
        if -(-num_chunks // rows) >= _FULL_GRID:
            return rows, warps
    return max(1, 32 // lanes), 1
