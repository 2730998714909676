"""The problem that every solver and every adjoint gets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Bool, PyTree

from ._algebra import AbstractAlgebra, WithIdentity, WithResets
from ._misc import bool_where, make_ravel, num_steps
from ._one_device import OneDevice
from ._step_properties import lacks_derivative, lacks_transpose, shared_axes
from ._tracing import typed_slice, typed_struct
from .jaxprs._counting import flops
from .jaxprs._elementwise import elementwise_tangents, passes_tangents
from .scans import AbstractScan
from .structures import AbstractStructure, detect_structure, is_affine


class _Found:
    """A cache of the properties of a step: each is computed once per solve, wherever JAX's
    transformations carry the recurrence."""

    def __init__(self, structure: AbstractStructure | None):
        self.answers: dict[str, Any] = {} if structure is None else {"structure": structure}

    def get(self, question: str, find: Callable[[], Any]) -> Any:
        if question not in self.answers:
            self.answers[question] = find()
        return self.answers[question]


class ElementwisePart(NamedTuple):
    """The part of a step's Jacobian that passes through elementwise operations only.

    - `structure`: its structure; `None` if it is zero.
    - `is_all`: whether it is the whole Jacobian.
    """

    structure: AbstractStructure | None
    is_all: bool


class Recurrence(eqx.Module):
    r"""$h_t = \mathrm{step}(h_{t-1}, x_t)$ for $t = 0, …, L-1$, with $h_{-1} = \mathrm{init}$.

    A pytree whose leaves are all arrays that the states depend on. [`pararnn.solve`][] makes it;
    a solver or an adjoint of your own reads it.

    - `step`: a function `step(state, x) -> state` that carries its arrays with it. If there are
        resets, they are in it already: it selects what it starts from.
    - `xs`: what the steps consume, a pytree of arrays that share their leading axis (with resets, a
        pair of the flags and the inputs).
    - `init`: the state before the first step.
    - `algebra`: the family of maps that the steps belong to, if it is known, or `None`.
    - `reverse`: whether time runs from the last input to the first: $h_t = \mathrm{step}(h_{t+1},
        x_t)$ with $h_L = \mathrm{init}$. Only a solver that declares `runs_backwards` meets it.
    - `row_shards`: where the steps lie, in the order of the rows of `xs`; `shards` is the same in
        the order of time. If on several devices, `xs` and all states are those of this
        device, and `init` is the state before the very first step. Only a solver that declares
        `supports_sharding` meets that.
    """

    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]
    xs: PyTree[Any]
    init: PyTree[Any]
    algebra: AbstractAlgebra | None = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)
    row_shards: OneDevice = eqx.field(static=True)
    _found: _Found = eqx.field(static=True)

    def __init__(
        self,
        step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
        xs: PyTree[Any],
        init: PyTree[Any],
        *,
        resets: Bool[Array, " L"] | None = None,
        reset_state: PyTree[Any] | None = None,
        structure: AbstractStructure | None = None,
        algebra: AbstractAlgebra | None = None,
        reverse: bool = False,
        row_shards: OneDevice = OneDevice(),  # noqa: B008
        mask: Bool[Array, " L"] | None = None,
    ):
        """**Arguments:**

        - `step`, `xs`, `init`: as for [`pararnn.solve`][]; all arrays of `step` must be its leaves.
        - `resets`: which steps start from `reset_state` and not from the state before them.
        - `structure`, `algebra`: those of the step, if known. The structure is detected otherwise,
            when it is first used.
        - `reverse`: whether time runs from the last input to the first.
        - `row_shards`: where the steps lie, in the order of the rows of `xs`.
        - `mask`: which steps are made; the others leave the state as it is.
        """
        if resets is not None:
            step, xs = _ResettingStep(step, reset_state), (resets, xs)
        if mask is not None:
            step, xs = _MaskedStep(step), (mask, xs)
        self.step, self.xs, self.init = step, xs, init
        self.algebra, self.reverse, self.row_shards = algebra, reverse, row_shards
        self._found = _Found(structure)

    @property
    def length(self) -> int:
        """The number of steps, of this device."""
        return num_steps(self.xs)

    @property
    def shards(self) -> OneDevice:
        """The shards of time, in the order of time."""
        return self.row_shards.backwards() if self.reverse else self.row_shards

    def at(self, times: slice) -> slice:
        """The rows of the inputs and states at `times`, which count in the direction of the
        recurrence: a slice with all of its bounds, in steps forward."""
        if not self.reverse:
            return times
        start, stop, step = times.indices(self.length)
        count = len(range(start, stop, step))
        first = self.length - 1 - start
        last = first - step * count
        return slice(first, last if last >= 0 else None, -step) if count else slice(0, 0)

    @property
    def size(self) -> int:
        """The number of real numbers in a state."""
        return make_ravel(self.init)[2]

    def previous(self, states: PyTree[Array]) -> PyTree[Array]:
        """The states that the steps start from, `(init, states[0], …, states[L-2])`."""
        return self.row_shards.shift_right(states, self.init)

    def images(self, states: PyTree[Array]) -> PyTree[Array]:
        """The states after all steps, each from the state before it."""
        return jax.vmap(self.step)(self.previous(states), self.xs)

    def composed(self, algebra: AbstractAlgebra, scan: AbstractScan) -> PyTree[Array]:
        """The states by composition of the steps as elements of the `algebra`."""
        algebra = _lifted(algebra, self.step)
        elements = jax.vmap(algebra.element)(self.xs)
        composed = scan.prefixes(lambda earlier, later: algebra.compose(later, earlier), elements)
        return jax.vmap(algebra.apply, in_axes=(0, None))(composed, self.init)

    # --- properties found by tracing the step once --------------------------------------------

    @property
    def structure(self) -> AbstractStructure:
        """The structure of `∂step/∂state`: the one that was declared, or else detected."""
        return self._found.get("structure", lambda: detect_structure(*self._example()))

    @property
    def elementwise(self) -> ElementwisePart:
        """The part of the step's Jacobian that passes through elementwise operations only."""
        return self._found.get("elementwise", self._find_elementwise)

    def _find_elementwise(self) -> ElementwisePart:
        step, state, x = self._example()
        some, whole = passes_tangents(step, typed_struct(state), x)
        if not some:
            return ElementwisePart(None, whole)
        if whole:
            return ElementwisePart(self.structure, whole)
        return ElementwisePart(detect_structure(elementwise_tangents(step), state, x), whole)

    @property
    def flops(self) -> float:
        """The operations of a step."""
        return self._found.get("flops", lambda: flops(*self._example()))

    @property
    def is_affine(self) -> bool:
        """Whether the step is found affine in the state."""
        return self._found.get("is_affine", lambda: is_affine(*self._example()))

    @property
    def has_tangents(self) -> bool:
        """Whether tangents of the state can be pushed through the step."""
        return self._found.get("has_tangents", lambda: not lacks_derivative(*self._example()))

    @property
    def has_all_tangents(self) -> bool:
        """Whether tangents of the inputs and parameters can be pushed through it, too."""

        def find():
            return not lacks_derivative(*self._example(), of_all=True)

        return self._found.get("has_all_tangents", find)

    @property
    def has_cotangents(self) -> bool:
        """Whether cotangents of the state can be pulled back through the step."""
        return self._found.get("has_cotangents", lambda: not lacks_transpose(*self._example()))

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """The axes along which the step exchanges values with other sequences or devices."""
        return self._found.get("shared_axes", lambda: shared_axes(*self._example()))

    def _example(self) -> tuple[Any, Any, Any]:
        return self.step, self.init, typed_slice(self.xs)


def _lifted(algebra: AbstractAlgebra, step: Callable[..., Any]) -> AbstractAlgebra:
    """The algebra of a step with resets and a mask."""
    if isinstance(step, _MaskedStep):
        return WithIdentity(_lifted(algebra, step.step))
    if isinstance(step, _ResettingStep):
        return WithResets(algebra, step.reset_state)
    return algebra


class _MaskedStep(eqx.Module):
    """A step that keeps the state where its flag is not set."""

    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]

    def __call__(self, state: PyTree[Array], flag_and_x: tuple[Any, Any]) -> PyTree[Array]:
        flag, x = flag_and_x
        return bool_where(flag, self.step(state, x), state)


class _ResettingStep(eqx.Module):
    """A step that starts from `reset_state` where a flag is set, by selection: `0 * inf` is NaN."""

    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]
    reset_state: PyTree[Any]

    def __call__(self, state: PyTree[Array], flag_and_x: tuple[Any, Any]) -> PyTree[Array]:
        flag, x = flag_and_x
        return self.step(bool_where(flag, self.reset_state, state), x)


def scan_states(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
    xs: PyTree[Any],
    init: PyTree[Any],
    *,
    reverse: bool = False,
) -> PyTree[Array]:
    """All states by `jax.lax.scan`, with matrix products at full precision: the definition of a
    solution."""

    def body(state, x):
        state = step(state, x)
        return state, state

    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(body, init, xs, reverse=reverse)[1]


def precise(step: Callable[..., Any]) -> Callable[..., Any]:
    """The function with matrix products at full precision on every platform."""

    def run(*args):
        with jax.default_matmul_precision("highest"):
            return step(*args)

    return run
