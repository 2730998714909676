r"""What is asked of a scan.

Everything that runs along time or along chunks asks a scan for it: linear recurrences, the Kalman
filter of Levenberg–Marquardt, the index maps of speculation, algebras, and what the stopping rule
adds up. So another way to scan, a kernel or one across devices, is one class and nothing else.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Shaped

from .._misc import num_steps
from .._one_device import OneDevice
from ..structures import AbstractStructure


class AbstractScan(abc.ABC):
    """A way to apply an associative operation along the leading axis.

    Only `prefixes` is required; the others are made of it or are JAX's own, and may be replaced by
    something better. Instances are immutable and hashable, such as frozen dataclasses; a solver
    takes one as its `linear_method`.
    """

    # Up to which length a linear recurrence comes out as exact as one step after another. Longer
    # ones are corrected once. Infinite where no products of matrices are formed, which then cannot
    # overflow either.
    accurate_to: ClassVar[float] = 1024
    # Where the elements lie: on one device, but for what is made of a scan for several.
    shards: ClassVar[OneDevice] = OneDevice()

    @abc.abstractmethod
    def prefixes(
        self,
        combine: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
        elements: PyTree[Array],
        *,
        reverse: bool = False,
    ) -> PyTree[Array]:
        """$e_0$, $e_0 ∘ e_1$, $e_0 ∘ e_1 ∘ e_2$, … along the leading axis.

        **Arguments:**

        - `combine`: the associative operation on two single elements, the earlier one first.
        - `elements`: a pytree of arrays that share their leading axis, which may be empty.
        - `reverse`: from the last element to the first, which then is the "earlier" one.

        **Returns:**

        A pytree like `elements`.
        """

    def total(
        self,
        combine: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
        elements: PyTree[Array],
    ) -> PyTree[Array]:
        """The last of the `prefixes`, a single element, of at least one: by pairs of neighbours."""
        while num_steps(elements) > 1:
            even = num_steps(elements) // 2 * 2
            earlier, later = (_rows(elements, slice(i, even, 2)) for i in range(2))
            joined, odd = jax.vmap(combine)(earlier, later), _rows(elements, slice(even, None))
            elements = jtu.tree_map(lambda x, y: jnp.concatenate([x, y]), joined, odd)
        return jtu.tree_map(lambda x: x[0], elements)

    def affine(
        self,
        structure: AbstractStructure,
        matrices: Float[Array, "length *matrix"],
        offsets: Float[Array, "length size"],
        *,
        reverse: bool = False,
    ) -> Float[Array, "length size"]:
        """All $h_t = A_t h_{t-1} + b_t$ with $h_{-1} = 0$; see [`pararnn.linear_recurrence`][]."""

        def combine(earlier, later):
            return compose_affine(structure, earlier, later)

        return self.prefixes(combine, (matrices, offsets), reverse=reverse)[1]

    def prefix_states(
        self,
        structure: AbstractStructure,
        matrices: Float[Array, "length *matrix"],
        offsets: Float[Array, "length size"],
    ) -> Float[Array, "length size"]:
        """The state before each step of `affine`, $h_{t-1}$."""
        return self.shards.shift_right(self.affine(structure, matrices, offsets))

    @property
    def local(self) -> "AbstractScan":
        """The scan of those elements that lie on one device."""
        return self

    def cumulative_max(self, x: Shaped[Array, "length *rest"]) -> Shaped[Array, "length *rest"]:
        """The largest number so far, along the leading axis."""
        return jax.lax.cummax(x)

    def cumulative_sum(self, x: Shaped[Array, "length *rest"]) -> Shaped[Array, "length *rest"]:
        """The sum so far, along the leading axis."""
        return jnp.cumsum(x, axis=0)


def _rows(tree: PyTree[Array], rows: slice) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[rows], tree)


def compose_affine(
    structure: AbstractStructure, earlier: tuple[Array, Array], later: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The affine map `later ∘ earlier`, each a matrix and an offset."""
    (matrix1, offset1), (matrix2, offset2) = earlier, later
    return structure.compose(matrix2, matrix1), structure.apply(matrix2, offset1) + offset2
