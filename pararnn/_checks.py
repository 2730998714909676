"""What `solve` and the layers refuse, and the remedy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._misc import struct, time_slice
from .solvers import AbstractSolver


def check_flags(name: str, flags: Any, length: int) -> Bool[Array, " L"]:
    """`flags` as an array; raises unless it is a boolean for each of `length` steps."""
    flags = jnp.asarray(flags)
    if flags.dtype != jnp.bool_ or flags.shape != (length,):
        raise ValueError(
            f"`{name}` must be a boolean array of shape ({length},), one flag per step of `xs`; "
            f"got {flags.dtype} of shape {flags.shape}."
        )
    return flags


def check_solver(name: str, solver: Any) -> None:
    if solver is not None and not isinstance(solver, AbstractSolver):
        hint = " Did you forget the parentheses?" if isinstance(solver, type) else ""
        raise TypeError(
            f"`{name}` must be a solver such as pararnn.Newton(), or None; got {solver!r}.{hint}"
        )


def to_arrays(name: str, tree: PyTree[Any]) -> PyTree[Array]:
    def one(path, leaf):
        try:
            array = jnp.asarray(leaf)
        except TypeError as e:
            where = jtu.keystr(path)
            raise TypeError(f"`{name}{where}` must be an array; got {leaf!r}.") from e
        return jax.lax.convert_element_type(array, array.dtype)  # strips weak types

    return jtu.tree_map_with_path(one, tree)


def check_xs(xs: PyTree[Array]) -> None:
    leaves = jtu.tree_leaves_with_path(xs)
    if not leaves:
        raise ValueError(
            "`xs` must have at least one array, whose leading axis says how many steps to take; "
            "for a recurrence without inputs pass, for example, `jnp.arange(L)` and ignore it."
        )
    for path, x in leaves:
        if x.ndim == 0:
            raise ValueError(f"`xs{jtu.keystr(path)}` must have a leading time axis; got a scalar.")
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
                f"solve differentiates with respect to the state; got {h.dtype}."
            )


def check_guess(guess: PyTree[Array], init: PyTree[Array], length: int) -> None:
    expected = jtu.tree_map(lambda h: jax.ShapeDtypeStruct((length, *h.shape), h.dtype), init)
    if struct(guess) != expected:
        raise ValueError(
            "`guess` must be shaped like the states, that is, like `init` with a leading axis of "
            f"length {length}: {expected}; got {struct(guess)}."
        )


def check_step(step: Any, xs: PyTree[Array], init: PyTree[Array]) -> None:
    out = eqx.filter_eval_shape(step, struct(init), time_slice(xs))
    bad = [leaf for leaf in jtu.tree_leaves(out) if not isinstance(leaf, jax.ShapeDtypeStruct)]
    if bad:
        raise TypeError(f"`step` must return arrays only; got {bad[0]!r} in its result.")
    got, expected = jtu.tree_structure(out), jtu.tree_structure(init)
    if got != expected:
        raise ValueError(
            f"`step` must return a state with the structure of `init`, {expected}; got {got}."
        )
    for (path, new), old in zip(jtu.tree_leaves_with_path(out), jtu.tree_leaves(init), strict=True):
        where = jtu.keystr(path)
        if new.shape != old.shape:
            raise ValueError(
                f"`step` must keep the shape of the state: `init{where}` has {old.shape}, "
                f"but the new state has {new.shape}."
            )
        if new.dtype != old.dtype:
            raise ValueError(
                f"`step` must keep the dtype of the state: `init{where}` is {old.dtype}, but the "
                f"new state is {new.dtype}. Cast inside `step`, or pass `init` as {new.dtype}."
            )
