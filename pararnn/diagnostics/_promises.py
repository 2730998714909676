"""Promises of steps and cells: a step is a pure function, a cell treats each time step alike."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._misc import num_steps, previous_states
from ._agreement import agreement_tolerance, differing_rows
from ._arguments import SolveArguments


def is_pure(
    step: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]],
    xs: PyTree[Any],
    init: PyTree[Any],
    states: PyTree[Any],
) -> bool:
    """Whether `step`, traced and compiled twice, gives the same numbers at some of the states.

    A step that counts its calls or draws its own random numbers is traced into another program each
    time.
    """
    if num_steps(xs) == 0:
        return True
    steps = sample_steps(num_steps(xs), 8)
    inputs = jtu.tree_map(lambda x: x[steps], (previous_states(init, states), xs))
    # A new function each time, which JAX has not traced yet.
    first, again = (jax.jit(lambda h, x: jax.vmap(step)(h, x))(*inputs) for _ in range(2))
    return not np.any(differing_rows(again, first, _other_program))


def broken_promises(arguments: SolveArguments, states: PyTree[Array]) -> tuple[str, ...]:
    """The promises that a cell breaks, a sentence each; none for a step function.

    Inputs (and states, for the readout) are exchanged at a few steps, to see which steps change;
    and a few steps are streamed from the true state before them.

    **Arguments:**

    - `arguments`: for one sequence, with concrete arrays.
    - `states`: those of the sequential run.
    """
    layer, xs, us = arguments.layer, arguments.xs, arguments.us
    if layer is None or num_steps(xs) == 0:
        return ()
    cell, length = layer.cell, num_steps(xs)
    project = eqx.filter_jit(lambda xs: layer._prepare(xs, arguments.state).us(layer.cell))
    readout = eqx.filter_jit(lambda pair: cell.readout(*pair))
    ys = readout((states, us))
    for path, y in jtu.tree_leaves_with_path(ys):  # a layer refuses such a projection itself
        if jnp.ndim(y) == 0 or len(y) != length:
            return (
                f"`readout` changes the length: from {length} steps it makes an array of shape "
                f"{jnp.shape(y)} (at {jtu.keystr(path) or 'its root'})",
            )
    sentences = [
        _mixing("`project`", "the input", project, xs, us, cell.context),
        _mixing("`readout`", "the state", readout, (states, us), ys, 0),
        _streaming(arguments, states, ys),
    ]
    return tuple(sentence for sentence in sentences if sentence)


def sample_steps(length: int, count: int = 4) -> np.ndarray:
    """At most `count` steps of so many, spread evenly, with the first and the last one."""
    return np.unique(np.linspace(0, length - 1, count).astype(int))


def _other_program(dtype: Any) -> float:
    """Another program, or an accelerator, may round sums in another order."""
    return 100 * float(jnp.finfo(dtype).eps)


def _mixing(
    name: str, what: str, function: Callable[[Any], Any], inputs: Any, outputs: Any, context: int
) -> str:
    """Says which steps of the outputs wrongly depend on one step of the inputs, if any do."""
    for t in sample_steps(num_steps(inputs)):
        exchanged = _exchanged(inputs, int(t))
        if exchanged is None:
            continue
        changed = differing_rows(function(exchanged), outputs, _other_program)
        changed[t : t + context + 1] = False
        if np.any(changed):
            steps = np.flatnonzero(changed)
            shown = ", ".join(map(str, steps[:3])) + (", …" if len(steps) > 3 else "")
            until = f" to {t + context}, by its `context`" if context else " alone"
            return (
                f"{name} mixes time: another value of {what} at step {t} changes step "
                f"{shown}; it may change step {t}{until}"
            )
    return ""


def _exchanged(tree: PyTree[Array], t: int) -> PyTree[Array] | None:
    """The tree with another row at `t`; `None` if all rows are equal and hold only integers."""
    leaves = jtu.tree_leaves(tree)
    length = len(leaves[0])
    # A value that occurs elsewhere, such as a token, is a valid input.
    for shift in (1, 2, 3, 5, 7, 11, length // 2, length // 3):
        other = (t + shift) % length
        if any(np.any(np.asarray(x[t]) != np.asarray(x[other])) for x in leaves):
            return jtu.tree_map(lambda x, other=other: x.at[t].set(x[other]), tree)
    if not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves):
        return None

    def add_one(x):
        return x.at[t].add(jnp.ones((), x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jtu.tree_map(add_one, tree)


def _streaming(arguments: SolveArguments, states: PyTree[Array], ys: PyTree[Array]) -> str:
    """Says where a streamed step differs from the parallel call, if one does."""
    layer, xs = arguments.layer, arguments.xs
    assert layer is not None
    steps = sample_steps(num_steps(xs))

    def at_steps(tree):
        return jtu.tree_map(lambda x: x[steps], tree)

    state = at_steps(previous_states(arguments.init, states))
    past = layer._prepare(xs, arguments.state).past_of(layer.cell, steps)
    if past is not None:
        state = state, past
    try:
        y, new = eqx.filter_jit(lambda s, x: jax.vmap(layer.step)(s, x))(state, at_steps(xs))
    except (TypeError, ValueError) as error:
        return f"streaming fails: `step` of an RNN raises {type(error).__name__}: {error}"
    new = new if past is None else new[0]
    for name, got, whole in (("output", y, ys), ("state", new, states)):
        wrong = differing_rows(got, at_steps(whole), agreement_tolerance, whole)
        if np.any(wrong):
            return (
                f"streaming gives other numbers: from the same state, the {name} of step "
                f"{steps[np.argmax(wrong)]} differs from the parallel call's. Does `project` or "
                "`readout` look at other steps, at their number, or at the length?"
            )
    return ""
