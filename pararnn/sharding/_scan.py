import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._misc import bool_where, over_rows
from .._one_device import OneDevice
from ..scans import AbstractScan
from ..scans._base import compose_affine


@dataclasses.dataclass(frozen=True)
class ShardedScan(AbstractScan):
    """A scan over elements that lie on several devices, made of one over those of each.

    Each device composes its elements into one, its summary; all devices get all summaries, and each
    composes those before it. So whatever the number of elements, one exchange is made, of a single
    element per device.

    **Arguments:**

    - `scan`: of the elements of a device.
    - `shards`: where the elements lie.
    """

    scan: AbstractScan
    shards: OneDevice  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def local(self):
        return self.scan

    @property
    def accurate_to(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.scan.accurate_to

    def _shards(self, reverse: bool) -> OneDevice:
        return self.shards.backwards() if reverse else self.shards

    def prefixes(self, combine, elements, *, reverse=False):
        shards = self._shards(reverse)
        here = self.scan.prefixes(combine, elements, reverse=reverse)
        last = jtu.tree_map(lambda x: x[0 if reverse else -1], here)
        every = self.scan.prefixes(combine, shards.all_gather(last))
        before = jtu.tree_map(lambda x: x[jnp.maximum(shards.index - 1, 0)], every)
        joined = jax.vmap(combine, in_axes=(None, 0))(before, here)
        return bool_where(jnp.asarray(shards.is_first), here, joined)

    def total(self, combine, elements):
        summaries = self.shards.all_gather(self.scan.total(combine, elements))
        return self.scan.total(combine, summaries)

    def affine(self, structure, matrices, offsets, *, reverse=False):
        return self._affine(structure, matrices, offsets, reverse)[1]

    def prefix_states(self, structure, matrices, offsets):
        before, states = self._affine(structure, matrices, offsets, reverse=False)
        return jnp.concatenate([jnp.expand_dims(before, 0), states[:-1]])

    def _affine(self, structure, matrices: Array, offsets: Array, reverse: bool):
        """The state before this device's first element, and its states."""
        shards, rows = self._shards(reverse), (matrices, offsets)
        rows = jtu.tree_map(lambda x: jnp.flip(x, 0), rows) if reverse else rows
        compose = lambda earlier, later: compose_affine(structure, earlier, later)  # noqa: E731
        summary = self.scan.total(compose, rows)
        every = shards.all_gather(jnp.concatenate([x.reshape(-1) for x in summary]))
        cut = summary[0].size
        every = every[:, :cut].reshape(-1, *matrices.shape[1:]), every[:, cut:]

        def pass_on(h, device):
            i, (matrix, offset) = device
            return jnp.where(i < shards.index, structure.apply(matrix, h) + offset, h), None

        # What arrives need not be finite where this is the first device: selected, not multiplied.
        arrived = shards.place_like(jnp.zeros_like(offsets[0]), (every, offsets))
        arrived, _ = jax.lax.scan(pass_on, arrived, (jnp.arange(shards.count), every))
        first = -1 if reverse else 0
        carried = structure.apply(matrices[first], arrived)
        states = self.scan.affine(
            structure, matrices, offsets.at[first].add(carried), reverse=reverse
        )
        return arrived, states

    def cumulative_max(self, x):
        least = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        before = jnp.max(self._before(jnp.max(x, axis=0), least), axis=0, keepdims=True)
        return jnp.maximum(self.scan.cumulative_max(x), before)

    def cumulative_sum(self, x):
        before = self._before(jnp.sum(x, axis=0, dtype=x.dtype), 0)
        before = jnp.sum(before, axis=0, keepdims=True, dtype=x.dtype)
        return self.scan.cumulative_sum(x) + before

    def _before(self, x: Array, otherwise: Any) -> Array:
        """`x` of all devices, replaced by `otherwise` from this device on."""
        every, is_before = (
            self.shards.all_gather(x),
            jnp.arange(self.shards.count) < self.shards.index,
        )
        return jnp.where(over_rows(is_before, every), every, jnp.asarray(otherwise, x.dtype))
