"""The derivative's recurrence, one step after another.

For few sequences, in blocks of steps: what the derivative of a step needs from the step (gates,
activations) is computed for a block of steps at once, which leaves only the products with the
tangent to the sequential loop. For many, whose single step is work enough, step by step: there a
block would leave the caches, and `jax.vmap` would transpose all arrays to cut blocks out of them.

Either is rematerialised: reverse mode keeps nothing between forward and backward but the states and
the inputs, and no more than a block's worth of the rest at any time. To keep more would not be
faster: what moves costs more on a CPU than what is computed.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._detection import reaches
from ._devices import typed_slice, typed_struct
from ._misc import bool_where, num_steps, or_zeros, previous_states

# Bounds on the steps of a block, and the bytes of its states: with more, what is computed from them
# would not fit a processor's caches.
_MIN_BLOCK, _MAX_BLOCK = 32, 128
_BLOCK_BYTES = 32_768
# From so many sequences on, no blocks.
_MANY = 16


def sequential_tangents(
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    states: PyTree[Array],
    tangents: tuple[PyTree[Array | None], PyTree[Array | None], PyTree[Array | None]],
    *,
    batch: int = 1,
) -> PyTree[Array]:
    """The tangents of `states`, from those of `(step, xs, init)`, where `None` is zero. `batch` is
    a hint: how many sequences `jax.vmap` makes of this one.

    JAX transposes this into one pass backwards in time over the same blocks or steps.
    """
    # On an accelerator each operation of a step is a launch: there blocks always have fewer.
    if batch >= _MANY and jax.default_backend() == "cpu":
        return _step_by_step(step, xs, init, states, tangents)
    return _in_blocks(step, xs, init, states, tangents, batch=batch)


def _step_by_step(step, xs, init, states, tangents):
    step_tangent, xs_tangent, init_tangent = tangents

    # Where the first step starts from is put in there: of all ways to shift the states by one step,
    # only padding leaves the axis of a batch where it is, and others would transpose all of them.
    def push(arriving, inputs):
        is_first, previous, x, x_tangent = inputs
        _, leaving = eqx.filter_jvp(
            lambda step, state, x: step(state, x),
            (step, bool_where(is_first, init, previous), x),
            (step_tangent, arriving, x_tangent),
        )
        leaving = or_zeros(leaving, init)
        return leaving, leaving

    is_first = jnp.arange(num_steps(states)) == 0
    shifted = jtu.tree_map(_shifted, states)
    inputs = is_first, shifted, xs, xs_tangent
    push = jax.checkpoint(push, prevent_cse=False)
    return jax.lax.scan(push, or_zeros(init_tangent, init), inputs)[1]


def _shifted(states: Array) -> Array:
    """Later by one step, with zeros in front."""
    rest = [(0, 0, 0)] * (states.ndim - 1)
    return jax.lax.pad(states, jnp.zeros((), states.dtype), [(1, -1, 0), *rest])


def _in_blocks(step, xs, init, states, tangents, *, batch):
    step_tangent, xs_tangent, init_tangent = tangents
    pushes = _Pushes(step, init, xs)

    def through_block(arriving, inputs):
        start, states, xs, xs_tangent = inputs
        previous = previous_states(start, states)
        _, offsets = eqx.filter_jvp(
            lambda step, xs: jax.vmap(step)(previous, xs), (step, xs), (step_tangent, xs_tangent)
        )
        varying, shared = pushes.at(previous, xs)

        def push(v, inputs):
            varying, offset = inputs
            v = jtu.tree_map(jnp.add, pushes.apply(varying, shared, v), offset)
            return v, v

        return jax.lax.scan(push, arriving, (varying, or_zeros(offsets, states)))

    through_block = jax.checkpoint(through_block, prevent_cse=False)
    arriving = or_zeros(init_tangent, init)
    length = num_steps(states)
    width = batch * sum(h.size * h.dtype.itemsize for h in jtu.tree_leaves(init))
    block = _block_size(length, width)
    whole = length - length % block
    blocks, rest = _split((states, xs, xs_tangent), whole)
    blocks = jtu.tree_map(lambda x: x.reshape(whole // block, block, *x.shape[1:]), blocks)
    starts = previous_states(init, jtu.tree_map(lambda s: s[:, -1], blocks[0]))
    arriving, first = jax.lax.scan(through_block, arriving, (starts, *blocks))
    first = jtu.tree_map(lambda v: v.reshape(whole, *v.shape[2:]), first)
    if whole == length:
        return first
    start = jtu.tree_map(lambda s: s[whole - 1], states)
    _, last = through_block(arriving, (start, *rest))
    return jtu.tree_map(lambda *v: jnp.concatenate(v), first, last)


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


class _Pushes:
    """The derivatives of `step` with respect to the state, at many steps: the arrays that differ
    from step to step apart from those that do not, as weights, which must not be repeated."""

    _treedef: Any  # of one derivative; set when it is traced

    def __init__(self, step, init: PyTree[Array], xs: PyTree[Array]):
        def residuals(state, x):
            _, push = jax.linearize(lambda s: step(s, x), state)
            leaves, self._treedef = jtu.tree_flatten(push)
            return leaves

        self._residuals = residuals
        jaxpr = jax.make_jaxpr(residuals)(typed_struct(init), typed_slice(xs)).jaxpr
        self._varies = reaches(jaxpr, [True] * len(jaxpr.invars))

    def at(self, states: PyTree[Array], xs: PyTree[Array]) -> tuple[list[Array], list[Array]]:
        """The arrays that differ, and those that do not, at pairs of a state and an input."""
        axes = [0 if varies else None for varies in self._varies]
        leaves = jax.vmap(self._residuals, out_axes=axes)(states, xs)
        pairs = list(zip(leaves, self._varies, strict=True))
        return [x for x, varies in pairs if varies], [x for x, varies in pairs if not varies]

    def apply(
        self, varying: list[Array], shared: list[Array], tangent: PyTree[Array]
    ) -> PyTree[Array]:
        """The derivative at one step, from its own arrays and the shared ones."""
        own, common = iter(varying), iter(shared)
        leaves = [next(own) if varies else next(common) for varies in self._varies]
        return jtu.tree_unflatten(self._treedef, leaves)(tangent)
