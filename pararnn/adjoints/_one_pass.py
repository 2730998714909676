"""The derivative's recurrence, one step after another.

For few sequences, in blocks of steps: what the derivative of a step needs from the step (gates,
activations) is computed for a block of steps at once, which leaves only the products with the
tangent to the sequential loop. For many, whose single step is work enough, step by step: there a
block would leave the caches, and `jax.vmap` would transpose all arrays to cut blocks out of them.

Either is rematerialised: reverse mode keeps nothing between forward and backward but the states and
the inputs, and no more than a block's worth of the rest at any time. To keep more would not be
faster: what moves costs more on a CPU than what is computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import bool_where, or_zeros, previous_states
from .._platform import chosen_platform
from .._recurrence import Recurrence
from .._tracing import typed_slice, typed_struct
from .._validate import check_positive_int
from ..jaxprs._dependence import reaches
from ._base import AbstractLinearAdjoint, with_opaque_constants
from ._one_pass_sharded import Tangents, sharded_tangents

# Bounds on the steps of a block, and the bytes of its states: with more, what is computed from them
# would not fit a processor's caches.
_MIN_BLOCK, _MAX_BLOCK = 32, 128
_BLOCK_BYTES = 32_768
# From so many sequences on, no blocks.
_MANY = 16


@dataclasses.dataclass(frozen=True)
class OnePassAdjoint(AbstractLinearAdjoint):
    """One pass over all steps, which JAX transposes into one pass backwards in time.

    Stores no Jacobians, and is the fastest on a CPU.

    **Arguments:**

    - `block_size`: for how many steps at once to compute what the derivative needs from them; 1
        is one step after another. `None` chooses by platform, batch and the size of the state.
    """

    stepwise: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleMethodOverride]

    block_size: int | None = None

    def __post_init__(self):
        if self.block_size is not None:
            check_positive_int("block_size", self.block_size)

    def resolved(self, recurrence, platform=None, batch=1):
        if self.block_size is not None:
            return self
        # On an accelerator each operation of a step is a launch: there blocks always have fewer.
        if batch >= _MANY and chosen_platform(platform) == "cpu":
            return OnePassAdjoint(1)
        leaves = jtu.tree_leaves(recurrence.init)
        width = batch * sum(h.size * h.dtype.itemsize for h in leaves)
        return OnePassAdjoint(_block_size(recurrence.length, width))

    def tangents(self, recurrence, states, tangents):
        block_size = self.resolved(recurrence).block_size
        assert block_size is not None
        tangents = Tangents(tangents.step, tangents.xs, tangents.init)
        one_pass = functools.partial(_one_pass, block_size)
        if recurrence.shards.is_sharded:
            return sharded_tangents(one_pass, block_size, recurrence, states, tangents)
        return one_pass(recurrence, states, tangents)[1]


def _one_pass(
    block_size: int,
    recurrence: Recurrence,
    states: PyTree[Array],
    tangents: Tangents,
    added: PyTree[Array] | None = None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """The tangents of the last state and of all states; `added` is added to those of each step."""
    recurrence = with_opaque_constants(recurrence, tangents.step)
    added = jtu.tree_map(lambda _: None, states) if added is None else added
    if block_size == 1:
        return _step_by_step(recurrence, states, tangents, added)
    block_size = min(block_size, recurrence.length)
    return _in_blocks(recurrence, states, tangents, added, block_size)


def _plus(a: PyTree[Array], b: PyTree[Array | None]) -> PyTree[Array]:
    return jtu.tree_map(lambda x, y: x if y is None else x + y, a, b)


def _step_by_step(
    recurrence: Recurrence,
    states: PyTree[Array],
    tangents: Tangents,
    added: PyTree[Array | None],
) -> tuple[PyTree[Array], PyTree[Array]]:
    init, step_tangent = recurrence.init, tangents.step

    # Where the first step starts from is put in there: of all ways to shift the states by one step,
    # only padding leaves the axis of a batch where it is, and others would transpose all of them.
    def push(incoming, inputs):
        is_first, previous, x, x_tangent, added = inputs
        _, leaving = eqx.filter_jvp(
            lambda step, state, x: step(state, x),
            (recurrence.step, bool_where(is_first, init, previous), x),
            (step_tangent, incoming, x_tangent),
        )
        leaving = _plus(or_zeros(leaving, init), added)
        return leaving, leaving

    is_first = jnp.arange(recurrence.length) == 0
    inputs = is_first, previous_states(None, states), recurrence.xs, tangents.xs, added
    push = jax.checkpoint(push, prevent_cse=False)
    return jax.lax.scan(push, or_zeros(tangents.init, init), inputs)


def _in_blocks(
    recurrence: Recurrence,
    states: PyTree[Array],
    tangents: Tangents,
    added: PyTree[Array | None],
    block: int,
) -> tuple[PyTree[Array], PyTree[Array]]:
    step, init, length = recurrence.step, recurrence.init, recurrence.length
    pushes = _Pushes.of(recurrence)

    def through_block(incoming, inputs):
        start, states, xs, xs_tangent, added = inputs
        previous = previous_states(start, states)
        _, offsets = eqx.filter_jvp(
            lambda step, xs: jax.vmap(step)(previous, xs), (step, xs), (tangents.step, xs_tangent)
        )
        varying, shared = pushes.at(previous, xs)

        def push(v, inputs):
            varying, offset = inputs
            v = jtu.tree_map(jnp.add, pushes.apply(varying, shared, v), offset)
            return v, v

        offsets = _plus(or_zeros(offsets, states), added)
        return jax.lax.scan(push, incoming, (varying, offsets))

    through_block = jax.checkpoint(through_block, prevent_cse=False)
    incoming = or_zeros(tangents.init, init)
    whole = length - length % block
    blocks, rest = _split((states, recurrence.xs, tangents.xs, added), whole)
    blocks = jtu.tree_map(lambda x: x.reshape(whole // block, block, *x.shape[1:]), blocks)
    starts = previous_states(init, jtu.tree_map(lambda s: s[:, -1], blocks[0]))
    incoming, first = jax.lax.scan(through_block, incoming, (starts, *blocks))
    first = jtu.tree_map(lambda v: v.reshape(whole, *v.shape[2:]), first)
    if whole == length:
        return incoming, first
    start = jtu.tree_map(lambda s: s[whole - 1], states)
    incoming, rest = through_block(incoming, (start, *rest))
    return incoming, jtu.tree_map(lambda *v: jnp.concatenate(v), first, rest)


def _block_size(length: int, width: int) -> int:
    """For states of `width` bytes in all: what fits the caches, and at most four times the square
    root of the length. A size that leaves no rest is better, even if it is smaller: cutting a rest
    off takes copies of all inputs."""
    fitting = min(max(_BLOCK_BYTES // max(width, 1), _MIN_BLOCK), _MAX_BLOCK)
    most = min(4 * math.isqrt(length), fitting, length)
    without_rest = (n for n in range(most, most // 2, -1) if length % n == 0)
    return next(without_rest, most)


def _split(tree: PyTree[Array], index: int) -> tuple[PyTree[Array], PyTree[Array]]:
    return jtu.tree_map(lambda x: x[:index], tree), jtu.tree_map(lambda x: x[index:], tree)


class _Pushes(eqx.Module):
    """The derivatives of a step with respect to the state, at many steps: the arrays that differ
    from step to step apart from those that do not, as weights, which must not be repeated."""

    linearized: Callable[..., list[Any]]  # from a state and an input to a derivative's arrays
    treedef: Any = eqx.field(static=True)  # of a derivative
    varies: list[bool] = eqx.field(static=True)  # which of its arrays differ

    @classmethod
    def of(cls, recurrence: Recurrence) -> "_Pushes":
        def linearize(state, x):
            return jax.linearize(lambda s: recurrence.step(s, x), state)[1]

        example = typed_struct(recurrence.init), typed_slice(recurrence.xs)
        closed, push = jax.make_jaxpr(linearize, return_shape=True)(*example)
        varies = reaches(closed.jaxpr, [True] * len(closed.jaxpr.invars))
        flat = jex_core.jaxpr_as_fun(closed)
        return cls(lambda *args: flat(*jtu.tree_leaves(args)), jtu.tree_structure(push), varies)

    def at(self, states: PyTree[Array], xs: PyTree[Array]) -> tuple[list[Any], list[Any]]:
        """The arrays that differ, and those that do not, at pairs of a state and an input."""
        axes = [0 if varies else None for varies in self.varies]
        leaves = jax.vmap(self.linearized, out_axes=axes)(states, xs)
        pairs = list(zip(leaves, self.varies, strict=True))
        return [x for x, varies in pairs if varies], [x for x, varies in pairs if not varies]

    def apply(self, varying: list[Any], shared: list[Any], tangent: PyTree[Array]) -> PyTree[Array]:
        """The derivative at one step, from its own arrays and the shared ones."""
        own, common = iter(varying), iter(shared)
        leaves = [next(own) if varies else next(common) for varies in self.varies]
        return jtu.tree_unflatten(self.treedef, leaves)(tangent)
