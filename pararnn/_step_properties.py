"""Properties of a step: whether tangents can be pushed through it and cotangents pulled back, and
whether it exchanges values with other sequences.

They are found by tracing, hence they hold for all parameters and inputs.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .jaxprs._walk import equations, inner_jaxprs, open_jaxpr

_Step = Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]
# How JAX refuses to push tangents: by its own rules, those of a callback, and for want of a rule.
REFUSALS = (TypeError, ValueError, NotImplementedError)
# Primitives that name an axis, but bring nothing along it.
_SILENT = frozenset({"axis_index", "pvary", "pcast"})


def lacks_derivative(
    step: _Step, state: PyTree[Any], x: PyTree[Any], *, of_all: bool = False
) -> bool:
    """Whether `step` can be traced, but tangents cannot be pushed through it.

    **Arguments:**

    - `step`: the recurrence, `step(state, x) -> state`.
    - `state`, `x`: a state and one time slice of the inputs, as arrays or as
        `jax.ShapeDtypeStruct`.
    - `of_all`: whether to push tangents of the inputs and of all arrays that `step` carries too,
        and not of the state alone.
    """

    def call(step, state, x):
        return step(state, x)

    def push(step, state, x):
        def at(point):
            return call(*point) if of_all else call(step, point, x)

        point = (step, state, x) if of_all else state
        inexact, rest = eqx.partition(point, eqx.is_inexact_array)
        _, pushed = eqx.filter_jvp(lambda p: at(eqx.combine(p, rest)), (inexact,), (inexact,))
        return pushed

    try:
        eqx.filter_eval_shape(call, step, state, x)
    except Exception:
        return False  # whatever is wrong here, it is not the derivative
    try:
        jaxpr = eqx.filter_make_jaxpr(push)(step, state, x)[0]
    except REFUSALS:
        return True
    # JAX traces the tangents of a `custom_vjp`, in case that they are only transposed.
    return any(eqn.primitive.name == "custom_lin" for eqn in equations(jaxpr))


def lacks_transpose(step: _Step, state: PyTree[Any], x: PyTree[Any]) -> bool:
    """Whether cotangents of the state cannot be pulled back through `step`, for example because of
    a `while_loop`. Arguments as for `lacks_derivative`."""
    return why_no_transpose(step, state, x) is not None


def why_no_transpose(step: _Step, state: PyTree[Any], x: PyTree[Any]) -> str | None:
    """JAX's message where `lacks_transpose` holds; `None` otherwise."""

    def pull(state, x):
        new, pull = jax.vjp(lambda s: step(s, x), state)
        return pull(new)

    try:
        jax.eval_shape(pull, state, x)
    except REFUSALS as error:
        return str(error)
    return None


def shared_axes(step: _Step, state: PyTree[Any], x: PyTree[Any]) -> tuple[str, ...]:
    """The axes of `jax.vmap` or `jax.shard_map` along which `step` exchanges values with other
    sequences or devices, as by `jax.lax.pmean`. Arguments as for `lacks_derivative`."""
    jaxpr = eqx.filter_make_jaxpr(lambda step, state, x: step(state, x))(step, state, x)[0]
    return tuple(sorted(_exchanges(jaxpr)))


def check_alone(caller: str, step: _Step, state: PyTree[Any], x: PyTree[Any]) -> None:
    """Raises a `ValueError` if `step` needs other sequences beside it, which `caller` lacks."""
    try:
        eqx.filter_eval_shape(lambda step, state, x: step(state, x), step, state, x)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"`{caller}` runs one sequence by itself, but `step` exchanges values along a named "
            f"axis ({error}). Make the batch an axis of the state, and reduce over it; or compare "
            "`solve` with `jax.lax.scan` under your own `jax.vmap`."
        ) from error


def listed(axes: tuple[str, ...]) -> str:
    """The axes, for an error message."""
    names = ", ".join(f"'{axis}'" for axis in axes)
    return f"the axis {names}" if len(axes) == 1 else f"the axes {names}"


def check_unmasked(step: _Step, state: PyTree[Any], x: PyTree[Any]) -> None:
    """Raises a `ValueError` if `step` exchanges values with other sequences, for the use of masks,
    which move steps to other places."""
    axes = shared_axes(step, state, x)
    if axes:
        raise ValueError(
            "`mask` moves the steps of a sequence that count to its front, but `step` exchanges "
            f"values along {listed(axes)}, and would meet other steps there. Take the mask into "
            "the inputs, and keep the state in `step` where it is False."
        )


def _exchanges(jaxpr: Any) -> set[str]:
    names = set[str]()
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name in _SILENT:
            continue
        for key in ("axes", "axis_name"):
            value = eqn.params.get(key, ())
            value = value if isinstance(value, (tuple, list, frozenset)) else (value,)
            names.update(str(name) for name in value if not isinstance(name, int))
        inner = set[str]().union(*map(_exchanges, inner_jaxprs(eqn)))
        # What a `shard_map` within the step exchanges, it exchanges within the step.
        for key in ("manual_axes", "newly_manual_axes"):
            inner -= {str(name) for name in eqn.params.get(key, ())}
        names |= inner
    return names
