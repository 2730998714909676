"""The derivative's recurrence, one step after another, in blocks of steps.

What the derivative of a step needs from the step (gates, activations) is computed for a block of
steps at once. This leaves only the products with the tangent to the sequential loop; and as blocks
are rematerialised, reverse mode keeps nothing between forward and backward but the states and the
inputs, and no more than a block's worth of the rest at any time.
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
from ._misc import num_steps, or_zeros, previous_states

# More steps per block would not fit a processor's caches.
_MAX_BLOCK = 256


def sequential_tangents(
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    states: PyTree[Array],
    tangents: tuple[PyTree[Array | None], PyTree[Array | None], PyTree[Array | None]],
) -> PyTree[Array]:
    """The tangents of `states`, from those of `(step, xs, init)`, where `None` is zero.

    JAX transposes this into one pass backwards in time over the same blocks.
    """
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
    block = _block_size(length)
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


def _block_size(length: int) -> int:
    """At most four times the square root. A size that leaves no rest is better, even if it is
    smaller: cutting a rest off takes copies of all inputs."""
    most = min(4 * math.isqrt(length), _MAX_BLOCK, length)
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
