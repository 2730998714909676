"""The maps of chunks from state to state, where they are affine."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._algebra import AbstractAlgebra

_Matrices = Float[Array, "heads key_size value_size"]
_Factor = Float[Array, "#heads #key_size factors"]
_Element = tuple[_Factor, _Matrices]


def _times(factor: _Factor, matrices: Array) -> Array:
    if factor.shape[2] == 1:
        return factor * matrices
    with jax.default_matmul_precision("highest"):
        return factor @ matrices


@dataclasses.dataclass(frozen=True)
class MatrixAlgebra(AbstractAlgebra):
    """The maps of a state of one matrix per head that multiply it from the left and add something.
    An element is the pair of both; a factor of one column multiplies row by row."""

    def element(self, u: _Element) -> _Element:
        return u

    def constant(self, state: _Matrices) -> _Element:
        return jnp.zeros_like(state[:, :, :1]), state

    def compose(self, later: _Element, earlier: _Element) -> Any:
        (factor, added), (earlier_factor, earlier_added) = later, earlier
        return _times(factor, earlier_factor), _times(factor, earlier_added) + added

    def apply(self, element: _Element, state: _Matrices) -> _Matrices:
        factor, added = element
        return _times(factor, state) + added
