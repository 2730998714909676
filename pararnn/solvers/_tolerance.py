r"""In which units a difference of states is judged.

An error is as large as what it is an error *of*: each element of the state, at each time, is held
to its own magnitude there. But an element that is small because larger ones cancel in it carries
their rounding, and cannot be more exact than that. So how large the rounding is, is found by
experiment: by how much a chunk's end moves when the state is disturbed, in every step and
independently in every element, by the relative amount that a tolerance grants. This is the
componentwise backward error of Oettli and Prager (*Compatibility of approximate solution of linear
equations with given error bounds for coefficients and right-hand sides*, Numerische Mathematik
1964), by sampling.

The experiment costs a sweep, and its result is trusted near a solution only. Up to there, a coarser
scale does: the largest magnitude so far in the sequence, of the elements of a leaf that may
influence each other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._misc import is_complex, raveler
from .._norms import default_rtol
from ..scans import AbstractScan
from ..structures import AbstractStructure

# How many units in the last place count as rounding.
_ROUNDING = 4.0
# Disturbances of several elements may cancel by accident: of so many, with other signs, the largest
# effect counts.
SAMPLES = 5


class Tolerance:
    """The tolerance of an iteration: `atol + rtol * scale` for each element.

    A *scale* below is given in units of the default tolerance, as the absolute difference that the
    default `rtol` allows, so that leaves of several dtypes go together: a user's `rtol` is that of
    the widest, and the others follow in proportion.
    """

    def __init__(
        self,
        init: PyTree[Any],
        structure: AbstractStructure,
        scan: AbstractScan,
        rtol: float | None,
        atol: float,
    ):
        self._scan, self._line = scan, scan.line
        _, _, size, self._dtype = raveler(init)
        leaves = jtu.tree_leaves(init)
        self.wide = self._dtype if jnp.finfo(self._dtype).bits >= 32 else np.dtype(np.float32)
        sizes = [leaf.size * (2 if is_complex(leaf) else 1) for leaf in leaves]
        self._grains = [default_rtol(leaf.dtype) for leaf in leaves]
        self._coarsest = max(self._grains)
        self._grain = np.repeat(self._grains, sizes).astype(self.wide)
        eps = [float(jnp.finfo(leaf.dtype).eps) for leaf in leaves]
        rounding = [_ROUNDING * e / grain for e, grain in zip(eps, self._grains, strict=True)]
        self._rounding = np.repeat(rounding, sizes).astype(self.wide)
        self._factor = 1.0 if rtol is None else rtol / default_rtol(self._dtype)
        self._atol = atol
        # Elements of one group share their coarse scale: those of a leaf that may meet.
        self._leaves = np.repeat(np.arange(len(leaves)), sizes)
        pairs = np.stack([self._leaves, structure.labels(size)])
        _, groups = np.unique(pairs, axis=1, return_inverse=True)
        self._groups = groups.reshape(-1)

    def _per_element(self, values: np.ndarray) -> Float[Array, "1 size"]:
        return jnp.expand_dims(jnp.asarray(values), 0)

    def _magnitude(self, x: Array) -> Float[Array, "*rows size"]:
        x = jnp.abs(x).astype(self.wide)
        return jnp.where(jnp.isfinite(x), x, 0)

    def coarse(self, values: Float[Array, "n size"]) -> Float[Array, "n size"]:
        """The scale far from a solution: the largest magnitude so far of any element of the group.

        A state that decays to zero is judged by what it was, one that grows by what it is now.
        """
        largest = _largest(self._magnitude(values), self._groups)
        return self._coarsest * self._scan.cumulative_max(largest)

    def most(self, values: Float[Array, "n size"]) -> Float[Array, "1 size"]:
        """The largest scale that `fine` may give: what is granted to the largest element of a leaf,
        on any device. Chaos may drive a disturbance to any size."""
        magnitude = _largest(self._magnitude(values), self._leaves)
        most = jnp.max(magnitude, axis=0, keepdims=True, initial=0.0)
        return self._coarsest * self._line.largest(most)

    def fine(
        self, values: Array, images: Array, disturbed: Float[Array, "samples n size"], most: Array
    ) -> Float[Array, "n size"]:
        """The scale close to a solution: of each element on its own.

        **Arguments:**

        - `values`: the solution.
        - `images`, `disturbed`: what the steps before led to, and where they lead when disturbed,
            by one or several samples. Of fewer than `SAMPLES`, those of the nearest rows count too.
        - `most`: as `most` gives it.
        """
        images = jnp.expand_dims(images.astype(self.wide), 0)
        moved = self._magnitude(disturbed.astype(self.wide) - images)
        moved = _largest_near(jnp.max(moved, axis=0), -(-SAMPLES // len(disturbed)))
        local = self._per_element(self._grain) * self._magnitude(values)
        return jnp.minimum(most, local + moved)

    def norm(self, difference: Array, scale: Float[Array, "n size"]) -> Float[Array, " n"]:
        """The largest element of each difference, in units of the tolerance; `inf` if any is not
        finite."""
        size = jnp.abs(difference).astype(self.wide)
        unit = self._atol + self._factor * scale + float(jnp.finfo(self.wide).tiny)
        norm = jnp.where(size == 0, 0, size / unit)
        norm = jnp.where(jnp.isfinite(size), norm, jnp.inf)
        return jnp.max(norm, axis=-1, initial=0.0).astype(jnp.float32)

    def beyond_rounding(self, difference: Array, scale: Array) -> Float[Array, "n size"]:
        """What is left of a difference without the rounding of a few operations."""
        difference = difference.astype(self.wide)
        rounding = self._per_element(self._rounding) * scale
        return jnp.sign(difference) * jnp.maximum(jnp.abs(difference) - rounding, 0)

    def disturb(self, state: PyTree[Array], place: Int[Array, ""]) -> PyTree[Array]:
        """The state with each element changed by the default tolerance, up or down. The signs look
        random, and depend on the `place`."""

        def one(leaf, grain, seed):
            real = jnp.finfo(leaf.dtype).dtype
            changed = grain * _signs(place, leaf.shape, 2 * seed).astype(real)
            if is_complex(leaf):
                other = grain * _signs(place, leaf.shape, 2 * seed + 1).astype(real)
                changed = jax.lax.complex(changed, other)
            return leaf + leaf * changed

        leaves, treedef = jtu.tree_flatten(state)
        seeds = range(len(leaves))
        return jtu.tree_unflatten(treedef, map(one, leaves, self._grains, seeds))


def _largest(values: Array, labels: np.ndarray) -> Float[Array, "n size"]:
    """For each element the largest of its row that has its label."""
    count = int(labels.max(initial=-1)) + 1
    if count == labels.size:
        return values
    if count == 1:
        return jnp.broadcast_to(jnp.max(values, axis=1, keepdims=True), values.shape)
    return jnp.max(values[:, _members(labels)], axis=-1)[:, labels]


def _largest_near(rows: Float[Array, "n size"], count: int) -> Float[Array, "n size"]:
    """Of each element, none of which is negative, the largest in `count` rows around its own."""
    before = (count - 1) // 2
    near = jnp.pad(rows, [(before, count - 1 - before), (0, 0)])
    return functools.reduce(jnp.maximum, [near[i : i + len(rows)] for i in range(count)])


def _members(labels: np.ndarray) -> Int[np.ndarray, "groups k"]:
    """The elements of each group; smaller groups repeat their first."""
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    first = np.expand_dims(np.cumsum(counts) - counts, 1)
    place = np.expand_dims(np.arange(counts.max()), 0)
    return order[first + np.where(place < np.expand_dims(counts, 1), place, 0)]


def _signs(place: Int[Array, ""], shape: tuple[int, ...], seed: int) -> Float[Array, "..."]:
    """1 or -1 for each element, by an integer hash (Wellons, *Prospecting for hash functions*,
    2018), which costs less than random numbers and has no key."""
    index = np.arange(np.prod(shape, dtype=int), dtype=np.uint32).reshape(shape)
    index = index * np.uint32(0x9E3779B9) + np.uint32(seed * 0x85EBCA6B & 0xFFFFFFFF)
    x = jnp.asarray(index) ^ (place.astype(np.uint32) * np.uint32(0xC2B2AE35))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return jnp.where(x >> np.uint32(31) == 0, 1.0, -1.0).astype(np.float32)
