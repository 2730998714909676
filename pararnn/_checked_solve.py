"""The check of computed states, and the errors that it raises."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._misc import bool_where, struct
from ._norms import all_finite
from ._one_device import OneDevice
from ._program_cache import is_traced
from ._recurrence import Recurrence
from ._shards import choose_shards
from ._solution import RESULTS, Stats
from .solvers import AbstractSolver, Report
from .solvers._base import FALLBACK, SolverOutput

_Checked = tuple[PyTree[Array], RESULTS, Stats]


@dataclasses.dataclass(frozen=True)
class CheckedSolve:
    """A solve whose result is checked: the function that an adjoint differentiates.

    - `solver`, `report`: the solver, and the function that it calls in every iteration.
    - `throw_from`: the place that an error at run time names; without one, none is raised.
    """

    solver: AbstractSolver
    report: Report | None = None
    throw_from: str | None = None

    def __call__(self, recurrence: Recurrence, guess: PyTree[Array] | None) -> _Checked:
        output = SolverOutput(*self.solver.solve(recurrence, guess, self.report))
        _check_states(self.solver, output.states, recurrence)
        checked, resume = _check(output, recurrence), output.resume
        if resume is None:
            return self._raise(checked, recurrence.shards)

        def turn(checked):
            # Raising is a part of it, so that a successful solve waits for the device only once.
            return self._raise(_check(resume(checked[0]), recurrence), recurrence.shards)

        failed = checked[1] != RESULTS.successful
        return recurrence.shards.once_where(failed, checked, turn, FALLBACK)

    def _raise(self, checked: _Checked, shards: OneDevice) -> _Checked:
        # Here and not on what `solve` returns, so that derivatives read checked states, too.
        if self.throw_from is None:
            return checked
        states, result, stats = checked
        states = throw_unless_successful(states, result, self.throw_from, shards)
        return states, result, stats


def _check(output: SolverOutput, recurrence: Recurrence) -> _Checked:
    result = RESULTS.where(output.converged, RESULTS.successful, RESULTS.not_converged)
    finite = ~recurrence.shards.any(~all_finite(output.states))
    return output.states, RESULTS.where(finite, result, RESULTS.nonfinite), output.stats


def _check_states(solver: AbstractSolver, states: PyTree[Any], recurrence: Recurrence) -> None:
    """Raises a `ValueError` unless `states` has the shapes and dtypes of the recurrence."""
    expected = jtu.tree_map(
        lambda h: jax.ShapeDtypeStruct((recurrence.length, *h.shape), h.dtype), recurrence.init
    )
    if struct(states) != expected:
        raise ValueError(
            f"`{type(solver).__name__}.solve` must return states shaped like `init` with a leading "
            f"axis of length {recurrence.length}: {expected}; got {struct(states)}."
        )


# Between a user's line and this file.
_NOT_USERS = frozenset("beartype contextlib equinox functools jax jaxtyping pararnn".split())


def call_site() -> str:
    """The line of the user's code that is being run, for an error at run time."""
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_USERS:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def throw_unless_successful(
    states: PyTree[Array], result: RESULTS, where: str, shards: OneDevice
) -> PyTree[Array]:
    """The states, with an error at run time, which names the place `where`, unless the result is
    `successful`. Every state depends on it, so that a caller may use any of them.

    The error is raised in a loop that turns only then. A condition around all states would copy
    them, and the compiler drops an error in a single row where nothing reads that row.
    """
    failed, some, error = _raiser(states, result, where, shards)
    if error is None:
        return _not_a_number(states, failed)

    def turn(carry):
        _, states = carry
        raised = error()
        return raised, jtu.tree_map(lambda h: h.at[0].set(jnp.where(raised, 0, h[0])), states)

    with jax.named_scope("pararnn_raise"):
        return jax.lax.while_loop(lambda carry: carry[0], turn, (some, states))[1]


def fail_unless_successful(
    tree: PyTree[Array], result: RESULTS, where: str, shards: OneDevice
) -> PyTree[Array]:
    """Like `throw_unless_successful`, for small arrays, and differentiable."""
    failed, _, error = _raiser(tree, result, where, shards)
    if error is None:
        return _not_a_number(tree, failed)
    # What an error passes through must be the same on all devices: a flag, not the arrays.
    return bool_where(error(), jtu.tree_map(jnp.zeros_like, tree), tree)


def checked(tree: PyTree[Array], result: RESULTS, throw: bool) -> PyTree[Array]:
    """The tree, with an error at run time, if `throw`, unless the result is `successful`."""
    if not throw:
        return tree
    if is_traced((tree, result)):
        shards = choose_shards((tree, result))
        return fail_unless_successful(tree, result, call_site(), shards)
    if not bool(result == RESULTS.successful):
        raise eqx.EquinoxRuntimeError(RESULTS[result])
    return tree


def _raiser(tree, result, where, shards):
    failed = result != RESULTS.successful
    messages = [
        f"{RESULTS[item]} (The solve is that at {where}. Of a batch, the `result` of "
        "`solve(…, throw=False)` tells which sequences.)"
        for item in (RESULTS.not_converged, RESULTS.nonfinite)
    ]
    index = (result == RESULTS.nonfinite).astype(int)
    return failed, *shards.raiser(tree, failed, index, messages)


def _not_a_number(tree, failed):
    """NaN in place of the tree, and of its derivatives, if the solve has failed."""
    return jtu.tree_map(lambda x: x * jnp.where(failed, jnp.nan, 1).astype(x.dtype), tree)


@contextlib.contextmanager
def errors_of_steps() -> Iterator[None]:
    """Re-raises an error of `equinox.error_if` in a step as `equinox.filter_jit` would."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"_EquinoxRuntimeError: (.*?)\s*-{10}", str(error), re.DOTALL)
        if found is None:
            raise
        raise eqx.EquinoxRuntimeError(found[1]) from None
