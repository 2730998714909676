r"""The derivative of all states with respect to everything they depend on.

Differentiating $h_t = f_θ(h_{t-1}, x_t)$ at its solution gives the linear recurrence

$$\dot h_t = J_t \dot h_{t-1} + b_t, \qquad J_t = \frac{∂f}{∂h}(h_{t-1}, x_t), \quad
b_t = \frac{∂f}{∂θ} \dot θ + \frac{∂f}{∂x} \dot x_t \;(+\, J_0 \dot h_{-1} \text{ at } t = 0),$$

with the *true* Jacobian, whatever the forward iteration used; the iterations are never
differentiated. Its transpose, which reverse mode needs, is the recurrence
$λ_t = J_{t+1}^\top λ_{t+1} + g_t$ run backwards.

How the modes come about: a `custom_jvp` rule whose tangents come from something that JAX can
transpose, batch, and differentiate again (the rule calls the differentiable function itself).
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import is_symbolic
from .._one_device import AxisName
from .._recurrence import Recurrence
from ..solvers import AbstractSolver

# `(recurrence, guess) -> (states, result, stats)`, not differentiable by itself.
Forward = Callable[[Recurrence, PyTree[Array] | None], tuple[PyTree[Array], Any, Any]]


class AbstractAdjoint(abc.ABC):
    """The derivative of the states of a solve: an immutable, hashable record, such as a frozen
    dataclass."""

    # Whether it makes one step after another and does nothing else, like `AbstractSolver.stepwise`.
    stepwise: ClassVar[bool] = False

    @property
    def supports_sharding(self) -> bool:
        """Whether it works where the steps lie on several devices. By default not."""
        return False

    @property
    def axis(self) -> AxisName | None:
        """Along which axis of a mesh its solver cuts time, `None` if it does not say."""
        return None

    @abc.abstractmethod
    def solve(
        self, forward: Forward, recurrence: Recurrence, guess: PyTree[Array] | None
    ) -> tuple[PyTree[Array], Any, Any]:
        """The result of `forward(recurrence, guess)`, `(states, result, stats)`, differentiable
        with respect to all arrays of the recurrence; not to the `guess`, on which the solution does
        not depend."""

    def resolved(
        self, recurrence: Recurrence, platform: str | None = None, batch: int = 1
    ) -> "AbstractAdjoint":
        """This adjoint with all options resolved for a recurrence, a platform (`None` is that of
        JAX), and the size of the batch, a hint. By default itself."""
        return self

    def exact(self) -> "AbstractAdjoint":
        """The adjoint of this kind that gives the true derivative. By default itself."""
        return self

    @property
    def backward_solver(self) -> AbstractSolver | None:
        """The solver to use for reverse mode if the step has no forward-mode derivative; `None`,
        the default, if the adjoint needs none."""
        return None


class AbstractLinearAdjoint(AbstractAdjoint):
    """An adjoint that computes tangents in a way that JAX can transpose: all modes work."""

    @abc.abstractmethod
    def tangents(
        self, recurrence: Recurrence, states: PyTree[Array], tangents: Recurrence
    ) -> PyTree[Array]:
        """The tangents of the `states`, which solve the recurrence, from those of its arrays:
        `tangents` is a recurrence of them, with `None` for zero."""

    def solve(self, forward, recurrence, guess):
        return solve_states(recurrence, guess, forward=forward, adjoint=self)


@eqx.filter_custom_jvp
def solve_states(
    recurrence: Recurrence,
    guess: PyTree[Array] | None,
    *,
    forward: Forward,
    adjoint: AbstractLinearAdjoint,
) -> tuple[PyTree[Array], Any, Any]:
    return forward(recurrence, guess)


@solve_states.def_jvp
def _solve_states_jvp(primals, tangents, *, forward, adjoint):
    (recurrence, guess), (tangents, _) = primals, tangents
    states, *others = solve_states(recurrence, guess, forward=forward, adjoint=adjoint)
    silent = jtu.tree_map(lambda _: None, others)
    if not jtu.tree_leaves(eqx.filter(tangents, eqx.is_array)):
        return (states, *others), (jtu.tree_map(lambda _: None, states), *silent)
    return (states, *others), (adjoint.tangents(recurrence, states, tangents), *silent)


def check_length(solver: AbstractSolver, recurrence: Recurrence) -> None:
    """Raises a `ValueError` if the `solver` of a derivative needs a length that is not known."""
    if is_symbolic(recurrence.length) and not solver.stepwise:
        raise ValueError(
            f"`xs` has the symbolic length {recurrence.length}, but `{type(solver).__name__}(…)`, "
            "the solver of `adjoint`, cuts a sequence into parts, whose number must be known when "
            "the program is traced. To export a derivative, use `adjoint=None` or "
            "`adjoint=pararnn.Sequential()`, or export a program for each length."
        )


def with_opaque_constants(recurrence: Recurrence, tangents: PyTree[Any]) -> Recurrence:
    """The recurrence with the constants of its step hidden from the compiler: the arrays that have
    no tangent. `tangents` are those of the step, `None` for zero.

    XLA's CPU library YNNPACK crashes on a reduction over `y[:, None, None] + constant`, among
    others, if a `jax.checkpoint` has hidden the constant for a while
    (https://github.com/jax-ml/jax/issues/39257, https://github.com/jax-ml/jax/issues/40412). It
    takes no `reduce_precision`, which changes nothing here. To be called within the
    `jax.checkpoint`; can go once both issues are closed in the oldest JAX supported.
    """

    def one(tangent, x):
        if tangent is not None or not eqx.is_inexact_array(x) or jnp.iscomplexobj(x):
            return x
        info = jnp.finfo(x.dtype)
        if x.ndim == 0 or info.bits > 32:
            return x
        return jax.lax.reduce_precision(x, info.nexp, info.nmant)

    step = jtu.tree_map(one, tangents, recurrence.step, is_leaf=lambda t: t is None)
    return eqx.tree_at(lambda r: r.step, recurrence, step)
