"""Does a cell keep its promises on time: in its projection, in its readout, and when streaming?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._misc import num_steps, previous_states
from .._norms import agreement_tolerance
from ._problem import Problem

_PLACES = 4


def broken_promises(problem: Problem, states: PyTree[Array]) -> tuple[str, ...]:
    """What is wrong with the cell of a problem, a sentence each; nothing for a step function.

    Inputs (and states, for the readout) are exchanged at a few steps, to see which steps change;
    and a few steps are made as in streaming, from the true state before them.

    **Arguments:**

    - `problem`: of one sequence, with concrete arrays.
    - `states`: those of the sequential run.
    """
    layer, xs, us = problem.layer, problem.xs, problem.us
    if layer is None or num_steps(xs) == 0:
        return ()
    cell, length = layer.cell, num_steps(xs)
    project = eqx.filter_jit(lambda xs: layer._prepare(xs, problem.state).us(layer.cell))
    readout = eqx.filter_jit(lambda pair: cell.readout(*pair))
    ys = readout((states, us))
    wrong = _wrong_length(ys, length)
    if wrong:
        return (wrong,)
    found = [
        _mixing("`project`", "the input", project, xs, us, cell.context),
        _mixing("`readout`", "the state", readout, (states, us), ys, 0),
        _streaming(problem, states, ys),
    ]
    return tuple(sentence for sentence in found if sentence)


def _wrong_length(ys: PyTree[Array], length: int) -> str:
    """Of a readout; a layer refuses such a projection itself."""
    for path, y in jtu.tree_leaves_with_path(ys):
        if jnp.ndim(y) == 0 or len(y) != length:
            return (
                f"`readout` changes the length: from {length} steps it makes an array of shape "
                f"{jnp.shape(y)} (at {jtu.keystr(path) or 'its root'})"
            )
    return ""


def _places(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, _PLACES).astype(int))


def _mixing(
    name: str, what: str, function: Callable[[Any], Any], inputs: Any, outputs: Any, context: int
) -> str:
    """Which steps of the output change with one step of the inputs, if it is any but they may."""
    length = num_steps(inputs)
    for t in _places(length):
        exchanged = _exchanged(inputs, int(t))
        if exchanged is None:
            continue
        changed = _changed_rows(function(exchanged), outputs)
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
    """The tree with another of its rows at `t`; `None` if all rows are the same, and integers."""
    leaves = jtu.tree_leaves(tree)
    length = len(leaves[0])
    # Values that occur are values that are allowed.
    for shift in (1, 2, 3, 5, 7, 11, length // 2, length // 3):
        other = (t + shift) % length
        if any(np.any(np.asarray(x[t]) != np.asarray(x[other])) for x in leaves):
            return jtu.tree_map(lambda x, other=other: x.at[t].set(x[other]), tree)
    if not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves):
        return None

    def add_one(x):
        return x.at[t].add(jnp.ones((), x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jtu.tree_map(add_one, tree)


def _changed_rows(got: PyTree[Array], expected: PyTree[Array]) -> np.ndarray:
    leaves = jtu.tree_leaves(expected)
    changed = np.zeros(len(leaves[0]), bool)
    for a, b in zip(jtu.tree_leaves(got), leaves, strict=True):
        different = (
            _different(a, b, 100 * float(jnp.finfo(b.dtype).eps), b)
            if _inexact(b)
            else (np.asarray(a) != np.asarray(b))
        )
        changed |= np.any(different.reshape(len(b), -1), axis=1)
    return changed


def _streaming(problem: Problem, states: PyTree[Array], ys: PyTree[Array]) -> str:
    layer, whole_xs = problem.layer, problem.xs
    assert layer is not None
    steps = _places(num_steps(whole_xs))
    prepared = layer._prepare(whole_xs, problem.state)
    state = jtu.tree_map(lambda h: h[steps], previous_states(problem.init, states))
    xs = jtu.tree_map(lambda x: x[steps], whole_xs)
    past = prepared.past_of(layer.cell, steps)
    if past is not None:
        state = state, past
    try:
        y, new = eqx.filter_jit(lambda s, x: jax.vmap(layer.step)(s, x))(state, xs)
    except (TypeError, ValueError) as error:
        return f"streaming fails: `step` of an RNN raises {type(error).__name__}: {error}"
    new = new if past is None else new[0]
    for name, got, whole in (("output", y, ys), ("state", new, states)):
        for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(whole), strict=True):
            if not _inexact(b):
                different = np.asarray(a) != np.asarray(b[steps])
            else:
                different = _different(a, b[steps], agreement_tolerance(b.dtype), b)
            bad = np.any(different.reshape(len(steps), -1), axis=1)
            if np.any(bad):
                return (
                    f"streaming gives other numbers: from the same state, the {name} of step "
                    f"{steps[np.argmax(bad)]} differs from the parallel call's. Does `project` or "
                    "`readout` look at other steps, at their number, or at the length?"
                )
    return ""


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _different(a: Any, b: Any, tolerance: float, whole: Any) -> np.ndarray:
    """Where `a` is not `b`, by the largest magnitude that an element has at any step. A much
    smaller element than others may be what rounding leaves of them."""
    a, b, whole = (
        np.asarray(x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32))
        for x in (a, b, whole)
    )
    size = np.where(np.isfinite(whole), np.abs(whole), 0)
    scale = np.maximum(np.max(size, axis=0), 1e-3 * np.max(size, initial=0.0))
    with np.errstate(all="ignore"):
        near = (np.abs(a - b) <= tolerance * scale) | (a == b) | (np.isnan(a) & np.isnan(b))
    return ~near
