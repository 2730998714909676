"""Random steps: a few random operations on the state, the input and weights, then a bounded next
state. All comes from one seed."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_operations import (
    BINARY,
    COMPLEX,
    INTEGERS,
    REDUCTIONS,
    REDUCTIONS_OF_BOOLEANS,
    REDUCTIONS_OF_INTEGERS,
    UNARY,
    moves_of,
)
from random_weights import factors, one_of, rearranged_weight

STATES = {
    "scalar": [()],
    "vector": [(6,)],
    "long": [(12,)],
    "matrix": [(3, 4)],
    "square": [(4, 4)],
    "cube": [(2, 3, 2)],
    "pair": [(4,), (2, 3)],
    "single": [(1,), (6, 1)],
    "typed": [(6,), (4,), (2, 3)],  # the second of integers, the third of booleans
}
MOST = 48  # elements of a value
OPERATIONS = (
    "unary unary unary binary binary binary scale product product product product_of_values move "
    "move move joined reduction reduction comparison logic selection choice whole integers "
    "integers integer_product real_again"
).split()
OF_COMPLEX = "complex_function complex_function complex_pair complex_pair product".split()


class Step(NamedTuple):
    """**Fields:**

    - `step`: `step(state, x) -> state`; a state is a list.
    - `init`: the shapes and dtypes of the state.
    - `xs`: those of one input.
    - `names`: of the operations.
    """

    step: Callable[..., Any]
    init: list[jax.ShapeDtypeStruct]
    xs: jax.ShapeDtypeStruct
    names: list[str]


class _Maker:
    def __init__(self, seed: int, dtype: Any, state: str):
        self.rng = np.random.default_rng(seed)
        self.dtype = jnp.dtype(dtype)
        kinds = [np.int32, np.bool_] if state == "typed" else [self.dtype] * 2
        shapes = STATES[state]
        pairs = zip(shapes, [self.dtype, *kinds], strict=False)
        self.init = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in pairs]
        self.xs = jax.ShapeDtypeStruct(shapes[0], self.real)
        self.types = [*self.init, self.xs]
        self.lines: list[tuple[Callable[..., Any], Sequence[int]]] = []
        self.names: list[str] = []

    @property
    def real(self):
        return self.dtype if self.dtype != np.complex64 else jnp.dtype(np.float32)

    # --- choices --------------------------------------------------------------------------------

    def some(self, kind: Any, ndim: int = 0) -> int | None:
        """A value of some kind, a late one more often than an early one."""
        fitting = [
            i
            for i, t in enumerate(self.types)
            if jnp.issubdtype(t.dtype, kind) and len(t.shape) >= ndim and t.shape != (0,)
        ]
        if not fitting:
            return None
        return fitting[max(self.rng.integers(len(fitting), size=2))]

    def add(self, name: str, function: Callable[..., Any], *operands: int) -> int | None:
        """Writes down an operation, unless its result is too large."""
        out = jax.eval_shape(function, *(self.types[i] for i in operands))
        if not 0 < math.prod(out.shape) <= MOST:
            return None
        self.types.append(out)
        self.lines.append((function, operands))
        self.names.append(name)
        return len(self.types) - 1

    def fitted(self, i: int, shape: Sequence[int]) -> int:
        """A value in another shape."""
        old, shape = self.types[i].shape, tuple(shape)
        if old == shape:
            return i
        size = math.prod(shape)
        fits = len(old) == len(shape) and all(a in (1, b) for a, b in zip(old, shape, strict=True))
        if math.prod(old) == size:
            function = lambda v: v.reshape(shape)  # noqa: E731
        elif fits or old == ():
            function = lambda v: jnp.broadcast_to(v, shape)  # noqa: E731
        elif math.prod(old) > size:
            start = int(self.rng.integers(math.prod(old) - size + 1))
            function = lambda v: v.reshape(-1)[start : start + size].reshape(shape)  # noqa: E731
        else:
            times = -(-size // math.prod(old))
            function = lambda v: jnp.tile(v.reshape(-1), times)[:size].reshape(shape)  # noqa: E731
        added = self.add(f"fit {old} {shape}", function, i)
        assert added is not None
        return added

    # --- operations -----------------------------------------------------------------------------

    def unary(self):
        i = self.some(jnp.floating)
        if i is not None:
            name = one_of(self.rng, UNARY)
            self.add(name, UNARY[name], i)

    def binary(self):
        i, j = self.some(jnp.floating), self.some(jnp.floating)
        if i is not None and j is not None:
            name = one_of(self.rng, BINARY)
            dtype = self.types[i].dtype
            j = self.fitted(j, self.types[i].shape)
            function = BINARY[name]
            self.add(name, lambda a, b: function(a, b.astype(dtype)), i, j)

    def scale(self):
        """With a weight of the same shape, moved into it."""
        i = self.some(jnp.inexact)
        shape, dtype = self.types[i].shape, self.types[i].dtype
        weight = rearranged_weight(self.rng, shape, dtype)
        self.add("scale", lambda v: v * weight(), i)

    def product(self):
        """With a weight, by one or two axes, in heads or without."""
        i = self.some(jnp.inexact, 1)
        if i is None:
            return
        shape, dtype = self.types[i].shape, self.types[i].dtype
        axes = "abcd"[: len(shape)]
        contracted = [a for a in axes if self.rng.random() < 0.6] or [one_of(self.rng, axes)]
        shared = [a for a in axes if a not in contracted and self.rng.random() < 0.5]
        new = one_of(self.rng, ["", "m", "m", "m", "mn"])
        sizes = dict(zip(axes, shape, strict=True))
        sizes |= {k: int(one_of(self.rng, [1, 2, 3, 4, 6])) for k in new}
        letters = [*contracted, *shared, *new]
        letters = [letters[k] for k in self.rng.permutation(len(letters))]
        left = [a for a in axes if a not in contracted] + list(new)
        left = [left[k] for k in self.rng.permutation(len(left))]
        weight = rearranged_weight(self.rng, [sizes[a] for a in letters], dtype)
        scale = 1 / math.sqrt(math.prod(sizes[a] for a in contracted))
        operands = [axes, "".join(letters)]
        swapped = bool(self.rng.integers(2))
        spec = ",".join(operands[::-1] if swapped else operands) + "->" + "".join(left)

        def function(v):
            args = (weight(), v) if swapped else (v, weight())
            return jnp.einsum(spec, *args) * jnp.asarray(scale, dtype)

        self.add(f"einsum {spec}", function, i)

    def product_of_values(self):
        i, j = self.some(jnp.inexact, 1), self.some(jnp.inexact, 1)
        if i is None or j is None or self.types[i].dtype != self.types[j].dtype:
            return
        a, b = self.types[i].shape, self.types[j].shape
        if a == b and self.rng.random() < 0.5:
            axes = "abcd"[: len(a)]
            left = "".join(x for x in axes if self.rng.random() < 0.5)
            spec = f"{axes},{axes}->{left}"
            self.add(f"einsum {spec}", lambda u, v: jnp.einsum(spec, u, v), i, j)
        elif a[-1] == b[0]:
            self.add("tensordot", lambda u, v: jnp.tensordot(u, v, 1), i, j)
        elif len(a) == len(b) == 1:
            self.add("outer", jnp.outer, i, j)

    def move(self):
        i = self.some(np.generic, 1)
        if i is None:
            return
        shape = self.types[i].shape
        axis = int(self.rng.integers(len(shape)))
        n = shape[axis]
        cut = int(self.rng.integers(1, n)) if n > 1 else 1
        shift = int(self.rng.integers(-n, n + 1))
        order = [int(k) for k in self.rng.permutation(len(shape))]
        split = [f for size in shape for f in factors(self.rng, size)]
        moves = moves_of(shape, axis, cut, shift, order, split)
        name = one_of(self.rng, moves)
        self.add(name, moves[name], i)

    def joined(self):
        i = self.some(np.generic, 1)
        j = self.some(np.generic, 1)
        if i is None or j is None or self.types[i].dtype != self.types[j].dtype:
            return
        shape, size = self.types[i].shape, math.prod(self.types[j].shape)
        if len(shape) == 1:
            j = self.fitted(j, (size,))
            self.add("join", lambda a, b: jnp.concatenate([a, b, a[:1]]), i, j)
        else:
            axis = int(self.rng.integers(len(shape)))
            j = self.fitted(j, shape)
            self.add("join", lambda a, b: jnp.concatenate([a, b], axis), i, j)

    def reduction(self):
        i = self.some(np.generic, 1)
        if i is None:
            return
        shape, dtype = self.types[i].shape, self.types[i].dtype
        axes = tuple(k for k in range(len(shape)) if self.rng.random() < 0.6) or (0,)
        if dtype == np.bool_:
            names = REDUCTIONS_OF_BOOLEANS
        elif jnp.issubdtype(dtype, jnp.integer):
            names = REDUCTIONS_OF_INTEGERS
        elif jnp.issubdtype(dtype, jnp.complexfloating):
            names = {"sum": jnp.sum}
        else:
            names = REDUCTIONS
        name, keepdims = one_of(self.rng, names), bool(self.rng.integers(2))
        function = names[name]
        self.add(f"{name} {axes}", lambda v: function(v, axis=axes, keepdims=keepdims), i)

    def comparison(self):
        i, j = self.some(jnp.floating), self.some(jnp.floating)
        if i is not None and j is not None:
            dtype = self.types[i].dtype
            function = one_of(self.rng, [lax.lt, lax.le, lax.gt, lax.ge, lax.ne])
            j = self.fitted(j, self.types[i].shape)
            self.add("compare", lambda a, b: function(a, b.astype(dtype)), i, j)

    def logic(self):
        i, j = self.some(np.bool_), self.some(np.bool_)
        if i is not None and j is not None:
            function = one_of(
                self.rng, [jnp.logical_and, jnp.logical_or, jnp.logical_xor, lax.max, lax.min]
            )
            j = self.fitted(j, self.types[i].shape)
            self.add("logic", lambda a, b: ~function(a, b), i, j)

    def selection(self):
        i, j, k = self.some(np.bool_), self.some(jnp.inexact), self.some(jnp.inexact)
        if i is None or j is None or k is None or self.types[j].dtype != self.types[k].dtype:
            return
        shape = self.types[j].shape
        k = self.fitted(k, shape)
        if self.types[i].shape == () and self.rng.random() < 0.5:
            self.add("select", lax.select, i, j, k)
            return
        i = self.fitted(i, shape)
        self.add("select", lambda p, a, b: jnp.where(p, a, b), i, j, k)

    def choice(self):
        i, j = self.some(np.int32), self.some(jnp.inexact)
        if i is not None and j is not None:
            i = self.fitted(i, self.types[j].shape)
            self.add("choose", lambda n, v: lax.select_n(n & 3, v, -v, 2 * v, 1 - v), i, j)

    def whole(self):
        """Integers from numbers."""
        i = self.some(jnp.floating)
        if i is not None:
            dtype = one_of(self.rng, [*[np.int32] * 3, np.int8, np.int64, np.uint32, np.uint8])

            def function(v):
                return jnp.clip(jnp.floor(5 * v), -99, 99).astype(np.int32).astype(dtype)

            self.add("whole", function, i)

    def integers(self):
        i, j = self.some(jnp.integer), self.some(jnp.integer)
        if i is not None and j is not None:
            name, dtype = one_of(self.rng, INTEGERS), self.types[i].dtype
            j = self.fitted(j, self.types[i].shape)
            function = INTEGERS[name]
            self.add(name, lambda a, b: function(a, b.astype(dtype)), i, j)

    def integer_product(self):
        i = self.some(np.int32, 1)
        if i is not None:
            n = self.types[i].shape[-1]
            weight = rearranged_weight(self.rng, (n, 3), np.dtype(np.int32))
            self.add("integer product", lambda v: v @ weight(), i)

    def real_again(self):
        """Numbers of moderate size from anything."""
        i = self.some(np.generic)
        dtype, real = self.types[i].dtype, self.real
        if jnp.issubdtype(dtype, jnp.complexfloating):
            part = one_of(self.rng, [jnp.real, jnp.imag])
            self.add("part", lambda v: part(v).astype(real), i)
        elif jnp.issubdtype(dtype, jnp.floating):
            other = one_of(self.rng, [np.float32, np.float64, self.real])
            self.add("cast", lambda v: jnp.sin(v.astype(other)).astype(real), i)
        elif dtype == np.bool_:
            self.add("real", lambda v: v.astype(real), i)
        else:
            self.add("real", lambda v: jnp.sin(v.astype(np.int32).astype(real)), i)

    def complex_function(self):
        i = self.some(jnp.complexfloating)
        if i is not None:
            name = one_of(self.rng, COMPLEX)
            self.add(name, COMPLEX[name], i)

    def complex_pair(self):
        i, j = self.some(jnp.complexfloating), self.some(jnp.inexact)
        if i is not None and j is not None:
            j = self.fitted(j, self.types[i].shape)
            function = one_of(self.rng, [lax.add, lax.sub, lax.mul])
            self.add("complex pair", lambda a, b: function(a, b.astype(a.dtype)), i, j)

    # --- the whole ------------------------------------------------------------------------------

    def made(self, count: int, operations: Sequence[str]) -> Step:
        for _ in range(count):
            getattr(self, one_of(self.rng, operations))()
        results = []
        for leaf in self.init:
            kind = leaf.dtype if leaf.dtype != np.int32 else jnp.integer
            picked = [
                i for i in (self.some(kind), self.some(kind), self.some(kind)) if i is not None
            ]
            results.append([self.fitted(i, leaf.shape) for i in picked])

        def step(state, x):
            values = [*state, x]
            for function, operands in self.lines:
                values.append(function(*(values[i] for i in operands)))
            return [
                _bounded([values[i] for i in picked], old)
                for old, picked in zip(state, results, strict=True)
            ]

        return Step(step, self.init, self.xs, self.names)


def _bounded(values, old):
    """The next state from some values: of moderate size."""
    dtype = old.dtype
    total = values[0].astype(dtype)
    if dtype == np.bool_:
        for v in values[1:]:
            total = total ^ v
        return total
    for v in values[1:]:
        total = total + v.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return lax.rem(total + old, jnp.full_like(total, 97))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        size = jnp.square(total.real) + jnp.square(total.imag)
        return total * lax.rsqrt(1 + size).astype(dtype)
    return jnp.asarray(0.3, dtype) * old + jnp.tanh(total)


def random_step(
    seed: int, dtype: Any, state: str, count: int, operations: Sequence[str] | None = None
) -> Step:
    """A step of so many operations, of any or of these."""
    if operations is None:
        operations = OPERATIONS + (OF_COMPLEX if dtype == np.complex64 else [])
    return _Maker(seed, dtype, state).made(count, operations)
