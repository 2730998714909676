"""Judging computed states, and raising where they are not right."""

import jax
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._misc import all_finite
from ._solution import RESULTS


def judge(states: PyTree[Array], converged: Bool[Array, ""]) -> RESULTS:
    """How a solve ended that has computed `states`."""
    result = RESULTS.where(converged, RESULTS.successful, RESULTS.not_converged)
    return RESULTS.where(all_finite(states), result, RESULTS.nonfinite)


def throw_unless_successful(states: PyTree[Array], result: RESULTS) -> PyTree[Array]:
    """The states, each of which depends on that the result is `successful`: whatever a caller goes
    on to use of them, an error is raised if it is not.

    A loop that turns only to raise. An error attached to all states by a condition would copy them,
    and one attached to a single row is dropped by the compiler where nothing reads that row.
    """

    def turn(carry):
        _, states = carry
        row = jtu.tree_map(lambda h: h[0], states)
        row = result.error_if(row, result != RESULTS.successful)
        return result != result, jtu.tree_map(lambda h, r: h.at[0].set(r), states, row)

    failed = result != RESULTS.successful
    return jax.lax.while_loop(lambda carry: carry[0], turn, (failed, states))[1]
