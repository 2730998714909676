"""Checks of the arguments of `solve` and the layers; errors name the argument and the remedy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ._algebra import AbstractAlgebra
from ._misc import num_steps, struct
from .adjoints import AbstractAdjoint
from .cells import AbstractCell
from .solvers import AbstractSolver

_BATCH = " For a batch of sequences use `jax.vmap`."


# --- policy -----------------------------------------------------------------------------------


def check_solver(name: str, solver: Any) -> None:
    """Raises unless `solver` is a solver or None."""
    if solver is not None and not isinstance(solver, AbstractSolver):
        is_adjoint = isinstance(solver, AbstractAdjoint)
        hint = " Pass it as `adjoint`." if is_adjoint else instance_hint(solver)
        raise TypeError(
            f"`{name}` must be a solver instance such as pararnn.Newton(), or None; got {solver!r}."
            f"{hint}"
        )


def check_adjoint(adjoint: Any) -> None:
    """Raises unless `adjoint` is a solver, an adjoint or None."""
    if not isinstance(adjoint, AbstractAdjoint):
        check_solver("adjoint", adjoint)


def check_algebra(algebra: Any) -> None:
    """Raises unless `algebra` is an algebra or None."""
    if algebra is not None and not isinstance(algebra, AbstractAlgebra):
        raise TypeError(
            f"`algebra` must be a pararnn.AbstractAlgebra or None; got {algebra!r}."
            f"{instance_hint(algebra)}"
        )


def brief(value: Any) -> str:
    """A value as a message shows it: a module, which may hold all weights, by its name."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, eqx.Module):
        return f"{type(value).__name__}(…)"
    return repr(value)


def instance_hint(value: Any) -> str:
    """The remedy where a class was passed in place of an instance."""
    if not isinstance(value, type):
        return ""
    return f" Did you forget the parentheses? Pass an instance, `{value.__name__}(...)`."


def check_callable(step: Any) -> None:
    """Raises unless `step` can be called."""
    if isinstance(step, AbstractCell):
        raise TypeError(
            f"`step` must be callable as step(state, x); got the cell {type(step).__name__}. Use "
            "`pararnn.RNN(cell)`, or pass `cell.step` with `cell.project(xs)`."
        )
    if not callable(step) or isinstance(step, type):
        raise TypeError(
            f"`step` must be callable as step(state, x); got {step!r}.{instance_hint(step)}"
        )


# --- arrays -----------------------------------------------------------------------------------


def to_arrays(name: str, tree: PyTree[Any]) -> PyTree[Array]:
    def one(path, leaf):
        try:
            array = jnp.asarray(leaf)
        except TypeError as e:
            where = jtu.keystr(path)
            hint = pytree_hint(leaf)
            raise TypeError(f"`{name}{where}` must be an array; got {leaf!r}.{hint}") from e
        return jax.lax.convert_element_type(array, array.dtype)  # strips weak types

    return jtu.tree_map_with_path(one, tree)


def step_hint(value: Any) -> str:
    """The remedy where a step function was passed in place of a cell."""
    if isinstance(value, (type, eqx.Module)) or not callable(value):
        return ""
    return (
        " A step function is solved by `pararnn.solve(step, xs, init)`. A layer needs a cell, "
        "which knows its initial state: a subclass of AbstractCell with `init_state` and `step`."
    )


def pytree_hint(leaf: Any) -> str:
    """The remedy where a dataclass is one leaf, because JAX does not know its fields."""
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return ""
    return (
        f" JAX does not look into the dataclass {type(leaf).__name__}: decorate it with "
        "`jax.tree_util.register_dataclass`, or derive it from `equinox.Module`."
    )


def _list_hint(xs: Any) -> str:
    """The remedy where `xs` may be a list of the steps' inputs."""
    if not isinstance(xs, (list, tuple)) or len(xs) < 2:
        return ""
    if len({jnp.shape(x) if jtu.all_leaves([x]) else None for x in xs}) > 1:
        return ""
    return (
        f" `xs` is a {type(xs).__name__} of {len(xs)}, that is, so many inputs, each with time as "
        "its leading axis. If each is the input of one step, stack them: `jnp.stack(xs)`."
    )


def check_flags(name: str, flags: Any, length: int) -> Bool[Array, " L"]:
    """`flags` as an array; raises unless it is a boolean for each of `length` steps."""
    flags = jnp.asarray(flags)
    if flags.dtype == jnp.bool_ and flags.shape == (length,):
        return flags
    hint = ""
    if flags.ndim == 2:
        hint = _BATCH
    elif flags.dtype != jnp.bool_:
        if flags.shape == (length,):
            hint = f" Pass `{name}.astype(bool)` for zeros and ones."
        if name == "mask" and jnp.issubdtype(flags.dtype, jnp.integer):
            hint += f" For the length of a sequence pass `pararnn.mask_of(length, {length})`."
        if name == "reset":
            hint += " For the ids of packed sequences pass `pararnn.segment_starts(segment_ids)`."
    raise ValueError(
        f"`{name}` must be a boolean array of shape ({length},), one flag per step of `xs`; "
        f"got {flags.dtype} of shape {flags.shape}.{hint}"
    )


def check_xs(xs: PyTree[Array]) -> None:
    leaves = jtu.tree_leaves_with_path(xs)
    if not leaves:
        raise ValueError(
            "`xs` must have at least one array, whose leading axis says how many steps to take; "
            "for a recurrence without inputs pass, for example, `jnp.arange(L)` and ignore it."
        )
    for path, x in leaves:
        if x.ndim == 0:
            hint = " For a list of numbers pass `jnp.asarray(xs)`." if isinstance(xs, list) else ""
            raise ValueError(
                f"`xs{jtu.keystr(path)}` must have a leading time axis; got a scalar.{hint}"
            )
    lengths = {x.shape[0] for _, x in leaves}
    if len(lengths) > 1:
        got = ", ".join(f"xs{jtu.keystr(path)}: {x.shape}" for path, x in leaves)
        raise ValueError(f"The leaves of `xs` must share their leading axis; got {got}.")


def check_init(init: PyTree[Array]) -> None:
    leaves = jtu.tree_leaves_with_path(init)
    if not leaves:
        raise ValueError("`init` must have at least one array.")
    for path, h in leaves:
        if not jnp.issubdtype(h.dtype, jnp.inexact):
            raise TypeError(
                f"`init{jtu.keystr(path)}` must be floating-point or complex, because the parallel "
                f"solve differentiates with respect to the state; got {h.dtype}. Cast it to a "
                "float, or move counters to `xs`, as in `xs=(xs, jnp.arange(L))`."
            )


def check_guess(guess: PyTree[Array], init: PyTree[Array], length: int) -> None:
    expected = jtu.tree_map(lambda h: jax.ShapeDtypeStruct((length, *h.shape), h.dtype), init)
    if struct(guess) != expected:
        raise ValueError(
            "`guess` must be shaped like the states, that is, like `init` with a leading axis of "
            f"length {length}: {expected}; got {struct(guess)}."
        )


def check_sequence(name: str, xs: Any) -> None:
    """Raises unless `xs` is one sequence of feature vectors."""
    if jnp.ndim(xs) != 2:
        hint = f" For a batch of sequences use `jax.vmap({name})`." if jnp.ndim(xs) == 3 else ""
        raise ValueError(f"`xs` must have shape (L, width); got {jnp.shape(xs)}.{hint}")


def check_projected(us: PyTree[Any], length: int) -> None:
    """Raises unless the leaves of `cell.project(xs)` are as long as `xs`."""
    for path, u in jtu.tree_leaves_with_path(us):
        if jnp.ndim(u) == 0 or jnp.shape(u)[0] != length:
            raise ValueError(
                f"`cell.project(xs)` must keep the leading axis of `xs`, one slice per step: of "
                f"{length} inputs it made `us{jtu.keystr(path)}` of shape {jnp.shape(u)}. A "
                "convolution must be padded in front, and declare its `context`."
            )


# --- the step ---------------------------------------------------------------------------------


class ExplainedStep(eqx.Module):
    """A step whose errors name the state and input of its trace. Costs nothing once traced."""

    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]

    def __call__(self, state: PyTree[Array], x: PyTree[Array]) -> PyTree[Array]:
        cell = getattr(self.step, "__self__", None)
        if isinstance(cell, AbstractCell):
            _check_is_projected(cell, x)
        try:
            new = self.step(state, x)
        except Exception as error:
            error.add_note(
                f"`step` failed when it was traced with a state {_describe(state)} and an input "
                f"{_describe(x)}, which is one time slice of `xs`. If it is the step of a cell, "
                f"its inputs are `cell.project(xs)`, not `xs`.{_list_hint(x)}"
            )
            raise
        for leaf in jtu.tree_leaves(new):
            hint = pytree_hint(leaf)
            if hint:  # JAX would compare such objects, and say that it cannot
                name = type(leaf).__name__
                raise TypeError(
                    f"`step` must return arrays only; got {name}(…) in its result.{hint}"
                )
        return new


def _check_is_projected(cell: AbstractCell, x: PyTree[Array]) -> None:
    """Raises if `x` is one array although `project` makes several of it: three features would be
    taken for three gates, without any error."""
    if not eqx.is_array(x):
        return
    try:
        us = jax.eval_shape(lambda x: cell.project(jnp.expand_dims(x, 0)), x)
    except Exception:
        return  # `x` is nothing that `project` takes, hence no raw input
    if not isinstance(us, jax.ShapeDtypeStruct):
        raise ValueError(
            f"`xs` must be what the steps of {type(cell).__name__} consume, `cell.project(xs)`; "
            f"got one array, a step's part of which is {_describe(x)}."
        )


def _describe(tree: PyTree[Any]) -> str:
    return eqx.tree_pformat(tree, width=10**6, struct_as_array=True)


class StateDtypeError(ValueError):
    """A step does not keep the dtype of the state."""


def check_new_state(new: PyTree[Any], old: PyTree[Any]) -> None:
    """Raises unless the new state has the structure, shapes and dtypes of the old one."""
    got, expected = jtu.tree_structure(new), jtu.tree_structure(old)
    if got != expected:
        hint = ""
        if isinstance(new, tuple) and len(new) == 2 and jtu.tree_structure(new[0]) == expected:
            hint = (
                " Return the state only, not `(carry, y)` as for `jax.lax.scan`: outputs are "
                "computed from all states afterwards (in the `readout` of a cell)."
            )
        raise ValueError(
            f"`step` must return a state with the structure of `init`, {expected}; got {got}.{hint}"
        )
    for (path, a), b in zip(jtu.tree_leaves_with_path(new), jtu.tree_leaves(old), strict=True):
        where = jtu.keystr(path)
        if not (eqx.is_array(a) or isinstance(a, jax.ShapeDtypeStruct)):
            raise TypeError(f"`step` must return arrays only; got {a!r} in its result.")
        if a.shape != jnp.shape(b):
            raise ValueError(
                f"`step` must keep the shape of the state: `init{where}` has {jnp.shape(b)}, "
                f"but the new state has {a.shape}.{_batch_hint(jnp.shape(b), a.shape)}"
            )
        if a.dtype != jnp.result_type(b):
            raise StateDtypeError(
                f"`step` must keep the dtype of the state: `init{where}` is {jnp.result_type(b)}, "
                f"but the new state is {a.dtype}. Cast inside `step`, pass `init` as {a.dtype}, or "
                f"cast what in `xs` is {a.dtype}."
            )


def _batch_hint(old: tuple[int, ...], new: tuple[int, ...]) -> str:
    """The remedy where the state may have been broadcast against a batch."""
    try:
        if np.broadcast_shapes(old, new) != new:
            return ""
    except ValueError:
        return ""
    return (
        " If `xs` or `init` holds a batch: one sequence is solved at a time, with time as the "
        "leading axis of `xs`. For a batch use `jax.vmap`, as in "
        "`jax.vmap(lambda xs: solve(step, xs, init))(xs)`."
    )


def blame_slice(error: Exception, cell: AbstractCell, x: PyTree[Array]) -> None:
    """Raises a plainer error than `error` if `x`, one time slice, is a sequence."""
    try:
        check_xs(x)
        length = num_steps(x)
        us = eqx.filter_eval_shape(cell.project, x)
        check_projected(us, length)
    except Exception:
        return  # `x` is no sequence that the cell takes, so `error` is about something else
    raise ValueError(
        f"`x` must be one time slice of the inputs; got {_describe(x)}, which is a sequence of "
        f"{length}. Call the layer for a sequence, `rnn(xs)`, or pass one step of it, `xs[t]`."
    ) from error


def blame_inputs(error: StateDtypeError, cell: AbstractCell, xs: PyTree[Array]) -> None:
    """Raises a plainer error than `error` if the inputs have a wider dtype than the cell."""
    parameters, inputs = _widest(cell), _widest(xs)
    if parameters is None or inputs is None or _bits(inputs) <= _bits(parameters):
        return
    raise ValueError(
        f"`xs` is {inputs}, but the parameters of {type(cell).__name__} are {parameters}, and the "
        f"state would not keep its dtype. Cast the inputs, `xs.astype(jnp.{parameters})`, or make "
        f"the cell with `dtype=jnp.{inputs}`."
    ) from error


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def _widest(tree: PyTree[Any]) -> Any:
    """The dtype of the widest floating-point or complex leaf."""
    dtypes = [leaf.dtype for leaf in jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))]
    return max(dtypes, key=_bits, default=None)
