"""Recurrences whose steps compose exactly: closed families of maps from state to state."""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._misc import bool_where


class AbstractAlgebra(abc.ABC):
    """A family of maps that contains every step of a cell and is closed under composition.

    An element is a pytree of arrays that represents one map; every method works on single elements,
    and is used with leading batch axes through `jax.vmap`. Affine recurrences need no algebra:
    `AssociativeScan` recognises them. Instances are immutable and hashable.
    """

    @abc.abstractmethod
    def element(self, u: PyTree[Array]) -> Any:
        """The element of the map `state -> step(state, u)`."""

    @abc.abstractmethod
    def constant(self, state: PyTree[Array]) -> Any:
        """The element of the map that forgets its argument and returns `state`."""

    @abc.abstractmethod
    def compose(self, later: Any, earlier: Any) -> Any:
        """The element of the map `state -> later(earlier(state))`; associative."""

    @abc.abstractmethod
    def apply(self, element: Any, state: PyTree[Array]) -> PyTree[Array]:
        """The map at `state`."""


@dataclasses.dataclass(frozen=True)
class WithResets(AbstractAlgebra):
    """This family with resets: a step starts from `reset_state` where a flag is set.

    Its `us` are pairs of the flag and what the `algebra` is given.
    """

    algebra: AbstractAlgebra
    reset_state: PyTree[Array]

    def element(self, u):
        flag, u = u
        ordinary = self.algebra.element(u)
        restarted = self.algebra.constant(self.algebra.apply(ordinary, self.reset_state))
        return bool_where(flag, restarted, ordinary)

    def constant(self, state):
        return self.algebra.constant(state)

    def compose(self, later, earlier):
        return self.algebra.compose(later, earlier)

    def apply(self, element, state):
        return self.algebra.apply(element, state)


@dataclasses.dataclass(frozen=True)
class WithIdentity(AbstractAlgebra):
    """This family with the identity, which a step is where its flag is not set.

    Its `us` are pairs of the flag and what the `algebra` is given.
    """

    algebra: AbstractAlgebra

    def element(self, u):
        flag, u = u
        return flag, self.algebra.element(u)

    def constant(self, state):
        return jnp.asarray(True), self.algebra.constant(state)

    def compose(self, later, earlier):
        (later_flag, later), (earlier_flag, earlier) = later, earlier
        both = self.algebra.compose(later, earlier)
        element = bool_where(later_flag, bool_where(earlier_flag, both, later), earlier)
        return later_flag | earlier_flag, element

    def apply(self, element, state):
        flag, element = element
        return bool_where(flag, self.algebra.apply(element, state), state)
