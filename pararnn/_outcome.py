"""Judging computed states, and raising where they are not right."""

import sys

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._misc import all_finite
from ._solution import RESULTS


def judge(states: PyTree[Array], converged: Bool[Array, ""]) -> RESULTS:
    """How a solve ended that has computed `states`."""
    result = RESULTS.where(converged, RESULTS.successful, RESULTS.not_converged)
    return RESULTS.where(all_finite(states), result, RESULTS.nonfinite)


# Between a user's line and this file.
_NOT_USERS = frozenset("beartype contextlib equinox functools jax jaxtyping pararnn".split())


def call_site() -> str:
    """The user's line that is being run, for an error that comes much later."""
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_USERS:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def throw_unless_successful(states: PyTree[Array], result: RESULTS, where: str) -> PyTree[Array]:
    """The states, each of which depends on that the result is `successful`: whatever a caller goes
    on to use of them, an error that names the place `where` is raised if it is not.

    A loop that turns only to raise. An error attached to all states by a condition would copy them,
    and one attached to a single row is dropped by the compiler where nothing reads that row.
    """

    def turn(carry):
        _, states = carry
        row = jtu.tree_map(lambda h: h[0], states)
        row = raise_if(row, result, where)
        return result != result, jtu.tree_map(lambda h, r: h.at[0].set(r), states, row)

    failed = result != RESULTS.successful
    return jax.lax.while_loop(lambda carry: carry[0], turn, (failed, states))[1]


def raise_if(row: PyTree[Array], result: RESULTS, where: str) -> PyTree[Array]:
    """The same numbers, once it is known that the result is `successful`."""
    for item in (RESULTS.not_converged, RESULTS.nonfinite):
        row = eqx.error_if(row, result == item, f"{RESULTS[item]} (The solve is that at {where}.)")
    return row
