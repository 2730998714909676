"""Finding the structure of a step's Jacobian by abstract interpretation.

The step's *derivative* is traced once, `tangent -> ∂f/∂state · tangent`, and each of its primitives
maps "which state elements may this element depend on" from inputs to outputs. Tracing the
derivative and not the step itself makes custom derivative rules, `stop_gradient` and comparisons
come out right. Only shapes are looked at, never values, so the answer holds for all parameters and
inputs.

The analysis is sound: a structure may be coarser than the true one, never finer.
"""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import scipy.sparse as sp
from jaxtyping import PyTree
from scipy.sparse.csgraph import connected_components

from .._misc import make_ravel
from .._step_properties import REFUSALS, lacks_derivative
from .._tracing import typed_result, typed_struct
from ..jaxprs._dependence import interpret, reaches
from ..jaxprs._patterns import Pattern, TooDenseError
from ._base import AbstractStructure
from ._block_diagonal import BlockDiagonal
from ._dense import Dense
from ._diagonal import Diagonal

_SLICE = "`x` must be one time slice of the inputs: pass `us[0]`, not `us`."


def detect_structure(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]], state: PyTree[Any], x: PyTree[Any]
) -> AbstractStructure:
    """Finds the structure of `∂ step(state, x) / ∂ state`.

    **Arguments:**

    - `step`: the recurrence, `step(state, x) -> state`.
    - `state`, `x`: a state and one time slice of the inputs, as arrays or as
        `jax.ShapeDtypeStruct`; only shapes and dtypes matter.

    **Returns:**

    [`pararnn.Diagonal`][], [`pararnn.BlockDiagonal`][] or [`pararnn.Dense`][]. The pattern that it
    describes contains every entry of the Jacobian that can be non-zero, for any parameters. A step
    without a derivative in forward mode, whose Jacobian cannot be looked at, is `Dense`.
    """
    jaxpr, size = _trace_derivative(step, state, x)
    if size == 0:
        return Diagonal()
    if jaxpr is None:
        return Dense()
    inputs: list[Pattern] = [None] * (len(jaxpr.invars) - 1)
    identity = cast(sp.csr_array, sp.eye_array(size, dtype=bool, format="csr"))
    try:
        (pattern,) = interpret(jaxpr, [*inputs, identity])
    except TooDenseError:
        return Dense()
    return _to_structure(pattern, size)


def is_affine(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]], state: PyTree[Any], x: PyTree[Any]
) -> bool:
    """Whether the Jacobian of `step` with respect to the state is found constant in it.

    Arguments as for `detect_structure`. May miss an affine step that is written in a roundabout
    way. A step that hides a nonlinearity from differentiation, as by `stop_gradient`, passes for
    affine.
    """
    jaxpr, size = _trace_derivative(step, state, x)
    if size == 0 or jaxpr is None:
        return size == 0
    inputs = len(jaxpr.invars) - 2
    return not any(reaches(jaxpr, [True, *[False] * inputs, False]))


def _trace_derivative(step, state, x) -> tuple[Any, int]:
    """The jaxpr of `(raveled state, x, tangent) -> ∂step/∂state · tangent`, `None` if the step has
    no such derivative; the state size."""
    state, x = typed_struct(state), typed_struct(x)
    ravel, unravel, size, _ = make_ravel(state)
    vector = typed_result(ravel, state)

    def vector_step(vector, x):
        try:
            new = step(unravel(vector), x)
        except Exception as error:
            error.add_note(f"`step` failed when it was traced. {_SLICE}")
            raise
        if _shapes(new) != _shapes(state):
            got, expected = (eqx.tree_pformat(t, struct_as_array=True) for t in (new, state))
            raise ValueError(
                f"`step` must return a state shaped like `state`, {expected}; got {got}. {_SLICE}"
            )
        return ravel(new)

    def derivative(vector, x, tangent):
        return jax.jvp(lambda v: vector_step(v, x), (vector,), (tangent,))[1]

    try:
        return jax.make_jaxpr(derivative)(vector, x, vector).jaxpr, size
    except REFUSALS:
        if lacks_derivative(step, state, x):
            return None, size
        raise


def _shapes(tree: PyTree[Any]) -> tuple[Any, list[tuple[int, ...]]]:
    return jtu.tree_structure(tree), [jnp.shape(leaf) for leaf in jtu.tree_leaves(tree)]


def _to_structure(pattern: Pattern, size: int) -> AbstractStructure:
    if pattern is None:
        return Diagonal()
    num_groups, labels = connected_components(pattern, directed=False)
    if num_groups == size:
        return Diagonal()
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    largest = max(map(len, groups))
    if num_groups * largest**2 >= size**2:  # padding would cost more than it saves
        return Dense()
    return BlockDiagonal(tuple(tuple(g.tolist()) for g in groups))
