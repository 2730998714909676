"""Many steps of many chunks in one kernel, generated from a user's step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._misc import is_complex, struct
from ._complex import as_numbers, as_parts, of_parts
from ._kernel import Geometry, Kernel
from ._pallas import launch, missing
from ._plan import make_plan
from ._program import Program, Unsupported, trace, without_empty
from ._registry import expand

_MOST_ELEMENTS = 2**31 - 1


def unsupported(step: Callable[..., Any], starts: PyTree[Any], xs: PyTree[Any]) -> str | None:
    """Why `fused_sweep` cannot run a step, or `None` if it can. The step is traced; nothing is
    compiled.

    **Arguments:**

    - `step`, `starts`, `xs`: as for `fused_sweep`; `starts` and `xs` may be
        `jax.ShapeDtypeStruct`s.
    """

    def plan():
        make_plan(_traced(*_real(step, starts, xs)))

    try:
        jax.eval_shape(plan)
    except Unsupported as reason:
        return f"the step {reason}"
    return None


def fused_sweep(
    step: Callable[..., Any],
    starts: PyTree[Array],
    xs: PyTree[Array],
    *,
    num_steps: int,
    stride: int,
    first: int = 0,
    keep: bool,
    reverse: bool = False,
    interpret: bool = False,
) -> tuple[PyTree[Array], PyTree[Array] | None]:
    r"""Runs `num_steps` steps of each of many chunks, in one kernel with the carry in registers.

    Step $i$ of chunk $c$ consumes the row

    $$\mathrm{clip}(\text{first} + c \cdot \text{stride} + i,\ 0,\ L - 1)$$

    of the inputs, counted from their end if `reverse`. Works under `jax.vmap`. It has no
    derivative: wrap it in a `jax.custom_jvp` or `jax.custom_vjp`.

    **Arguments:**

    - `step`: `step(carry, x) -> carry` of a single chunk; it may close over arrays.
    - `starts`: the initial carries of the chunks, along the first axis.
    - `xs`: the inputs in order of time, along the first axis.
    - `num_steps`, `stride`, `first`: as above. With a `stride` of 0, all chunks share the inputs.
    - `keep`: whether to return the carry after every step. The chunks must then be adjacent: a
        `stride` of `num_steps` and a `first` of 0.
    - `reverse`: whether time runs backwards.
    - `interpret`: whether to interpret the kernel without a GPU, slowly, as tests do.

    **Returns:**

    `(ends, states)`: the carries of all chunks after their last step; and, with `keep`, the carry
    after each step at the row that the step consumed, else `None`.

    **Raises:**

    `ValueError` if `unsupported` gives a reason, or for chunks that are not adjacent with `keep`.
    """
    if keep and (first != 0 or stride != num_steps):
        raise ValueError(
            "`keep` needs adjacent chunks: a `stride` of `num_steps` and a `first` of 0; got "
            f"`num_steps` {num_steps}, `stride` {stride} and `first` {first}."
        )
    step, starts, xs = _real(step, starts, xs)
    try:
        program = _traced(step, starts, xs)
        plan = make_plan(program)
    except Unsupported as reason:
        raise ValueError(
            f"`step` cannot become a kernel: it {reason}. Use `jax.lax.scan`."
        ) from None
    num_chunks, length = _size(starts), _size(xs)
    geometry = Geometry(num_chunks, length, num_steps, stride, first, keep, reverse)
    kernel = Kernel(program, plan, geometry, interpret)
    operands = without_empty(jtu.tree_leaves((starts, xs)), 1)
    operands += program.constants()
    operands.append(np.ones(1, np.int32))
    flat = launch(
        kernel,
        [_matrix(x, len(x) if i < kernel.num_indexed else 1) for i, x in enumerate(operands)],
        kernel.results(),
        programs=kernel.programs,
        warps=kernel.warps,
        interpret=interpret,
    )
    return as_numbers(_unflattened(program, starts, flat, keep, length))


def _real(step: Callable[..., Any], starts: PyTree[Any], xs: PyTree[Any]):
    """The sweep in real numbers, with the primitives replaced for which users registered rules."""
    step = expand(step)
    if not any(map(is_complex, jtu.tree_leaves((starts, xs)))):
        return step, starts, xs
    return of_parts(step), as_parts(starts), as_parts(xs)


def _size(tree: PyTree[Any]) -> int:
    return jtu.tree_leaves(tree)[0].shape[0]


def _traced(step: Callable[..., Any], starts: PyTree[Any], xs: PyTree[Any]) -> Program:
    if (reason := missing()) is not None:
        raise Unsupported(reason)
    _check_placement((starts, xs))
    _check_sizes(starts, xs)

    def one(tree):
        return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), struct(tree))

    program = trace(step, one(starts), one(xs))
    _check_placement(program.constants())
    return program


def _check_sizes(starts: PyTree[Any], xs: PyTree[Any]) -> None:
    """Refuses arrays whose indices need more than 32 bits; so may that of all states."""
    length = _size(xs)
    sizes = [max(len(h), length) * math.prod(h.shape[1:]) for h in jtu.tree_leaves(starts)]
    if max([*sizes, *(x.size for x in jtu.tree_leaves(xs))]) > _MOST_ELEMENTS:
        raise Unsupported("has arrays of more than 2^31 - 1 elements")


def _check_placement(arrays: PyTree[Any]) -> None:
    """Refuses arrays on manual or explicit axes of a mesh: a kernel runs on one device."""
    arrays = [x for x in jtu.tree_leaves(arrays) if isinstance(x, jax.Array)]
    kinds = set(jax.sharding.get_abstract_mesh().axis_types)
    for x in arrays:
        kinds |= set(jax.typeof(x).sharding.mesh.axis_types)
    varying = any(jax.typeof(x).manual_axis_type.varying for x in arrays)
    if varying or jax.sharding.AxisType.Manual in kinds:
        raise Unsupported("runs inside `jax.shard_map`")
    if jax.sharding.AxisType.Explicit in kinds:
        raise Unsupported("runs on a mesh with explicit axes")


def _matrix(x: Any, rows: int) -> Array:
    """An array as rows × elements; booleans are stored as bytes."""
    x = jnp.asarray(x).reshape(rows, -1)
    return x.astype(np.uint8) if x.dtype == np.bool_ else x


def _unflattened(program, starts, flat, keep, length):
    """The results as pytrees like `starts`."""
    leaves, treedef = jtu.tree_flatten(starts)
    count = len(program.carry)

    def tree(arrays, rows):
        rest = iter(arrays)

        def one(leaf):
            shape = (rows, *leaf.shape[1:])
            array = next(rest) if math.prod(leaf.shape[1:]) else jnp.zeros(shape)
            return array.reshape(shape).astype(leaf.dtype)

        return jtu.tree_unflatten(treedef, [one(leaf) for leaf in leaves])

    ends = tree(flat[:count], _size(starts))
    return ends, tree(flat[count:], length) if keep else None
