r"""The units in which a difference of states is judged.

An error is as large as what it is an error *of*: each element of the state, at each time, is held
to its own magnitude there. But an element that is small because larger ones cancel in it carries
their rounding, and cannot be more exact than that. So how large the rounding is, is found by
experiment: by how much a chunk's end moves when the state is disturbed, in every step and
independently in every element, by the relative amount that a tolerance grants. This is the
componentwise backward error of Oettli and Prager (*Compatibility of approximate solution of linear
equations with given error bounds for coefficients and right-hand sides*, Numerische Mathematik
1964), by sampling.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._misc import finite_or, is_complex, make_ravel
from .._norms import default_rtol
from ..structures import AbstractStructure, Dense

# Disturbances of several elements may cancel by accident: of so many, with other signs, the largest
# effect counts.
SAMPLES = 5
# A difference is rounding if a disturbance of every state by this many units in the last place
# makes as much; up to this many times what is granted to the largest element, as chaos may drive a
# disturbance to any size.
_ROUNDING, _AMPLIFIED = 8.0, 4.0
# States that are off by no more tolerances, and no larger part of the largest element, are nearly
# right: what disturbances make of them is what they make of the solution.
_NEAR, _NEAR_SHARE = 100.0, 0.1
# So many units in the last place are the rounding of a step, and of what is compared with it.
_FEW = 3.0


class Tolerance:
    """The tolerance of an iteration: `atol + rtol * scale` for each element.

    A *scale* below is given in units of the default tolerance, as the absolute difference that the
    default `rtol` allows, so that leaves of several dtypes go together: a user's `rtol` is that of
    the widest, and the others follow in proportion. Elements that the `structure` connects with
    those of a narrower leaf may carry its rounding.
    """

    def __init__(
        self,
        init: PyTree[Any],
        rtol: float | None,
        atol: float,
        structure: AbstractStructure | None = None,
        normwise: bool = False,
    ):
        _, _, _, self._dtype = make_ravel(init)
        leaves = jtu.tree_leaves(init)
        self.wide = self._dtype if jnp.finfo(self._dtype).bits >= 32 else np.dtype(np.float32)
        sizes = [leaf.size * (2 if is_complex(leaf) else 1) for leaf in leaves]
        self._grains = [default_rtol(leaf.dtype) for leaf in leaves]
        self._grain = np.repeat(self._grains, sizes).astype(self.wide)
        self._coarsest: Any = max(self._grains, default=0.0)
        if len(set(self._grains)) > 1:
            self._coarsest = _largest_of_connected(self._grain, structure or Dense())
        eps = [float(jnp.finfo(leaf.dtype).eps) for leaf in leaves]
        rounding = [_ROUNDING * e / grain for e, grain in zip(eps, self._grains, strict=True)]
        self._rounding = np.repeat(rounding, sizes).astype(self.wide)
        self._factor = 1.0 if rtol is None else rtol / default_rtol(self._dtype)
        self._atol, self._connected = atol, structure if normwise else None
        self._leaves = np.repeat(np.arange(len(leaves)), sizes)

    def _magnitude(self, x: Array) -> Float[Array, "*rows size"]:
        return jnp.abs(x).astype(self.wide)

    def most(self, values: Float[Array, "n size"]) -> Float[Array, "1 size"]:
        """The default tolerance of the largest element of a leaf in any row."""
        largest = jnp.max(self._magnitude(values), axis=0, keepdims=True, initial=0.0)
        return _largest(largest, self._leaves) * self._coarsest

    def of_connected(
        self, values: Float[Array, "n size"], structure: AbstractStructure
    ) -> Float[Array, "n size"]:
        """The default tolerance of the largest of the elements of a leaf that may influence each
        other, in each row."""
        pairs = np.stack([self._leaves, structure.labels(values.shape[1])])
        _, groups = np.unique(pairs, axis=1, return_inverse=True)
        return _largest(self._magnitude(values), groups.reshape(-1)) * self._coarsest

    def effect(
        self, images: Float[Array, "n size"], disturbed: Float[Array, "samples n size"]
    ) -> Float[Array, "n size"]:
        """By how much disturbances of the states before moved the `images`, at most. With fewer
        than `SAMPLES` samples, the maximum over neighbouring rows is used, relative to the largest
        element of the leaf in each: no row is excused by what is larger at other times."""
        images = images.astype(self.wide)
        moved = jnp.abs(disturbed.astype(self.wide) - jnp.expand_dims(images, 0))
        moved = jnp.max(finite_or(moved, 0.0), axis=0)
        reach = -(-SAMPLES // len(disturbed))
        if reach == 1:
            return moved
        magnitude = _largest(jnp.abs(images), self._leaves)
        magnitude = jnp.maximum(magnitude, float(jnp.finfo(self.wide).tiny))
        return jnp.maximum(moved, _largest_near(moved / magnitude, reach) * magnitude)

    def rounding(self, effect: Float[Array, "n size"]) -> Float[Array, "n size"]:
        """The effect of disturbances by a few units in the last place, from the `effect` of larger
        ones."""
        return _FEW / _ROUNDING * jnp.expand_dims(self._rounding, 0) * effect

    def of_each(self, values: Float[Array, "n size"]) -> Float[Array, "n size"]:
        """The tolerance of each element by its own magnitude, and at least the default one."""
        return (
            max(self._factor, 1.0) * jnp.expand_dims(self._grain, 0) * self._magnitude(values)
            + self._atol
        )

    def is_near(
        self, difference: Float[Array, "n size"], values: Float[Array, "n size"]
    ) -> Bool[Array, "n 1"]:
        """Whether a difference, not negative, is small beside the largest element of its leaf in
        the same row: at most 100 tolerances, and a tenth."""
        share = np.minimum(_NEAR * self._grain, _NEAR_SHARE).astype(self.wide)
        bound = jnp.expand_dims(share, 0) * _largest(self._magnitude(values), self._leaves)
        return jnp.all(difference <= bound, axis=1, keepdims=True)

    def scale(
        self, values: Float[Array, "n size"], effect: Float[Array, "n size"]
    ) -> Float[Array, "n size"]:
        """The scale of each element on its own.

        **Arguments:**

        - `values`: the states.
        - `effect`: what `effect` found of disturbances of the states before them. At most what is
            granted to the largest element of a leaf counts.
        """
        local = jnp.expand_dims(self._grain, 0) * self._magnitude(values)
        most = self.most(values)
        rounding = jnp.minimum(_AMPLIFIED * most, jnp.expand_dims(self._rounding, 0) * effect)
        scale = jnp.maximum(jnp.minimum(most, local + effect), rounding)
        if self._connected is None:
            return scale
        return jnp.maximum(scale, self.of_connected(values, self._connected))

    def norm(
        self, difference: Float[Array, "*several n size"], scale: Float[Array, "*several n size"]
    ) -> Float[Array, "*several n"]:
        """The largest element of each difference, in units of the tolerance; `inf` if any is not
        finite."""
        unit = self._factor * scale + (self._atol + float(jnp.finfo(self.wide).tiny))
        norm = jnp.max(jnp.abs(difference).astype(self.wide) / unit, axis=-1, initial=0.0)
        return finite_or(norm, jnp.inf).astype(jnp.float32)

    def disturb(
        self, state: PyTree[Array], place: Int[Array, ""], strength: Float[Array, ""]
    ) -> PyTree[Array]:
        """The state with each element changed by `strength` times the default tolerance, up or
        down; with strength 0 the state itself. The signs look random, and depend on the `place`."""

        def one(leaf, grain, seed):
            real = jnp.finfo(leaf.dtype).dtype
            size = (grain * strength).astype(real)
            changed = size * _signs(place, leaf.shape, 2 * seed).astype(real)
            if is_complex(leaf):
                other = size * _signs(place, leaf.shape, 2 * seed + 1).astype(real)
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


def _largest_of_connected(
    values: np.ndarray, structure: AbstractStructure
) -> Float[np.ndarray, "1 size"]:
    """For each element the largest of those that may influence it."""
    _, groups = np.unique(structure.labels(len(values)), return_inverse=True)
    largest = np.zeros(len(values), values.dtype)
    np.maximum.at(largest, groups, values)
    return largest[None, groups]


def _largest_near(rows: Float[Array, "n size"], count: int) -> Float[Array, "n size"]:
    """The maximum of each element, none of which is negative, over `count` rows around its own."""
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
    return 1 - 2 * (x >> np.uint32(31)).astype(np.float32)
