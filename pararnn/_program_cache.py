"""Compiling a function of a user's function, and keeping the program as long as that lives."""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

# By the function whose programs they are. A program refers to it weakly, so that whatever it closes
# over is freed with it; a static argument of one program for all would be kept for ever.
_programs: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Any]] = (
    weakref.WeakKeyDictionary()
)


def run_jitted(function: Callable[..., Any], step: Callable[..., Any], *args: Any) -> Any:
    """`function(step, *args)`, compiled once per `step`, shapes of arrays and the rest."""
    if isinstance(step, types.FunctionType | functools.partial):
        programs = _programs.setdefault(step, {})
        if function not in programs:
            reference = weakref.ref(step)
            programs[function] = _program(lambda *args: function(reference(), *args))
        program = programs[function]
    else:  # a module, whose arrays are arguments, or a method
        args, program = (step, *args), _general_program(function)
    arrays, rest = eqx.partition(args, _is_array)
    leaves, treedef = jtu.tree_flatten(rest)
    return program(arrays, (treedef, tuple(leaves)))


def _program(function):
    def solve(arrays, static):
        treedef, leaves = static
        return function(*eqx.combine(arrays, jtu.tree_unflatten(treedef, leaves)))

    return jax.jit(solve, static_argnums=1)


_general_program = functools.cache(_program)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def is_traced(tree: PyTree[Any]) -> bool:
    """Whether any array is traced, or would be if it were made now."""
    leaves = [*jtu.tree_leaves(tree), jnp.zeros(()) + 0]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
