"""What `solve` returns."""

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._misc import all_finite


class RESULTS(eqx.Enumeration):  # pyright: ignore[reportGeneralTypeIssues]
    """How a solve ended. Each value is the message that `throw=True` raises."""

    successful = ""
    not_converged = (
        "The parallel iteration did not converge and the sequential finish was switched off. "
        "Use `fallback=True`, increase `max_iters`, use a larger `chunk_size`, or loosen `rtol`."
    )
    nonfinite = (
        "A state is not finite. With `fallback=True` (the default) the states were computed "
        "sequentially from the first chunk that did not converge, so the recurrence itself "
        "overflows or returns NaN: check the scale of the parameters, of `init` and of `xs`."
    )


class Stats(eqx.Module):
    """What happened during a solve.

    - `iterations`: how many sweep-and-correct iterations were made; 0 for `Sequential`.
    - `correction`: the largest change that the last iteration made to any chunk's start, in
        units of the tolerance (`atol + rtol * scale`); 0 for `Sequential`.
    - `chunk_size`: how many steps a chunk has.
    - `sequential_steps`: how many steps were made one after another (the critical path): the
        chunk's length for each sweep, the final sweep included, and the sequential finish. A
        sequential solve has `L`.
    - `fallback`: whether some steps were finished sequentially.
    """

    iterations: Int[Array, ""]
    correction: Float[Array, ""]
    chunk_size: int = eqx.field(static=True)
    sequential_steps: Int[Array, ""]
    fallback: Bool[Array, ""]


class Solution(eqx.Module):
    """The states of a recurrence, and whether they can be trusted.

    - `states`: the state after each step: the pytree of `init`, each leaf with a leading axis `L`.
    - `final`: the state after the last step (`init` if `L` is 0).
    - `result`: an item of [`pararnn.RESULTS`][]; compare with `==`, print it for its message.
    - `stats`: see [`pararnn.Stats`][].
    """

    states: PyTree[Array, "S"]  # pyright: ignore[reportUndefinedVariable]
    final: PyTree[Array, "S"]  # pyright: ignore[reportUndefinedVariable]
    result: RESULTS
    stats: Stats


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
