"""The result of `solve`."""

import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree


class RESULTS(eqx.Enumeration):  # pyright: ignore[reportGeneralTypeIssues]
    """How a solve ended. Each value but that of `successful` is the message that `throw=True`
    raises; `print(solution.result)` shows it, and `RESULTS[solution.result]` is the message alone.
    """

    __module__ = "pararnn"  # an item is printed with the path at which users find it

    successful = "successful"
    not_converged = (
        "The parallel iteration did not converge and the sequential finish was switched off. "
        "Use `fallback=True`, increase `max_iters`, use a larger `chunk_size`, or loosen `rtol`."
    )
    nonfinite = (
        "A state is not finite. With `fallback=True` (the default) the states were computed "
        "sequentially from the first chunk that did not converge, so the recurrence itself "
        "overflows or returns NaN: check the scale of the parameters, of `init` and of `xs`. "
        "States that are infinite by design (a maximum that starts from -inf) need `throw=False`, "
        "or a finite number in place of infinity, such as `jnp.finfo(dtype).min`."
    )


def _as_count(number: Any) -> Int[Array, ""]:
    return jnp.asarray(number, jnp.int32)


class Stats(eqx.Module):
    """The report of a solve.

    - `iterations`: how many sweep-and-correct iterations were made; 0 for `Sequential`.
    - `correction`: the largest change that the last iteration made to any chunk's start, in
        units of the tolerance (`atol + rtol * scale`); 0 for `Sequential`.
    - `chunk_size`: how many steps a chunk has. A number, which an int becomes, as the others are:
        solutions of different solvers may be the branches of a `jax.lax.cond`.
    - `sequential_steps`: how many steps were made one after another (the critical path): the
        chunk's length for each sweep, the final sweep included, and the sequential finish. A
        sequential solve has `L`.
    - `fallback`: whether some steps were finished sequentially.
    """

    iterations: Int[Array, ""]
    correction: Float[Array, ""]
    chunk_size: Int[Array, ""] = eqx.field(converter=_as_count)
    sequential_steps: Int[Array, ""]
    fallback: Bool[Array, ""]

    def __repr__(self) -> str:
        names = ("iterations", "correction", "chunk_size", "sequential_steps", "fallback")
        return f"Stats({', '.join(f'{name}={_show(getattr(self, name))}' for name in names)})"


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

    def __repr__(self) -> str:
        fields = {
            "states": eqx.tree_pformat(self.states, struct_as_array=True),
            "final": eqx.tree_pformat(self.final, struct_as_array=True),
            "result": _show_result(self.result),
            "stats": repr(self.stats),
        }
        lines = "".join(f"{name}={text},\n" for name, text in fields.items())
        return f"Solution(\n{textwrap.indent(lines, '  ')})"


def _message(index: int) -> str:
    return RESULTS[jtu.tree_map(lambda _: np.asarray(index), RESULTS.successful)]


def _is_concrete(value: Any) -> bool:
    if isinstance(value, jax.Array):
        traced = isinstance(value, jax.core.Tracer)
        return not traced and value.is_fully_addressable and not value.is_deleted()
    return isinstance(value, (bool, int, float, np.ndarray, np.generic))


def _show(value: Any) -> str:
    """A number as such, a batch by its first and last numbers, anything else by its shape."""
    if not _is_concrete(value):
        return eqx.tree_pformat(value, struct_as_array=True)
    array = np.asarray(value)
    number = "{:.3g}".format if array.dtype.kind == "f" else str
    if array.ndim == 0:
        return number(array.item())
    text = np.array2string(array, separator=", ", threshold=8, formatter={"all": number})
    return " ".join(text.split())


def _show_result(result: RESULTS) -> str:
    """The message; for a batch, how often each occurs, by its first sentence."""
    leaves = jtu.tree_leaves(result)
    if len(leaves) != 1 or not _is_concrete(leaves[0]):
        return repr(result)
    values, counts = np.unique(np.asarray(leaves[0]), return_counts=True)
    messages = [_message(int(value)) for value in values]
    if np.ndim(leaves[0]) == 0:
        return f"RESULTS<{messages[0]}>"
    short = (message.partition(". ")[0] for message in messages)
    return f"RESULTS<{', '.join(f'{n} × {text}' for n, text in zip(counts, short, strict=True))}>"
