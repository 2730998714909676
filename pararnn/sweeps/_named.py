"""The ways to sweep that have a name, and which one a platform gets."""

from typing import Any, Literal

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._platform import chosen_platform, kernels_enabled
from ..kernels import unsupported
from ._base import AbstractSweep, Step
from ._fused import Fused
from ._scanned import Scanned
from ._unrolled import MOST_UNROLLED, Unrolled

SweepMethod = Literal["scan", "unrolled", "kernel"]
_NAMED: dict[str, AbstractSweep] = {
    "scan": Scanned(),
    "unrolled": Unrolled(),
    "kernel": Fused(),
}


def default_sweep_method(num_steps: int, platform: str | None = None) -> SweepMethod:
    """`"scan"` on a CPU, and for chunks of more than 32 steps; elsewhere `"unrolled"`."""
    if chosen_platform(platform) == "cpu" or num_steps > MOST_UNROLLED:
        return "scan"
    return "unrolled"


def uses_kernel(step: Step, init: PyTree[Any], xs: PyTree[Any], platform: str | None) -> bool:
    """Whether steps of a recurrence become a kernel where nothing is asked for: if kernels are
    switched on, and this one can be generated."""
    return kernels_enabled(platform) and why_no_kernel(step, init, xs) is None


def why_no_kernel(step: Step, init: PyTree[Any], xs: PyTree[Any]) -> str | None:
    """Why the steps of a recurrence cannot become a kernel, or `None` if they can."""
    start = jtu.tree_map(lambda h: jax.ShapeDtypeStruct((1, *h.shape), h.dtype), init)
    return unsupported(step, start, xs)


def as_sweep(name: str, method: Any) -> AbstractSweep:
    """The sweep that `method` stands for; for None, `jax.lax.scan`.

    Raises a `ValueError` that calls the argument `name` for anything else.
    """
    if method is None:
        return _NAMED["scan"]
    if isinstance(method, AbstractSweep):
        return method
    if isinstance(method, str) and method in _NAMED:
        return _NAMED[method]
    hint = ""
    if isinstance(method, type) and issubclass(method, AbstractSweep):
        hint = f" Did you forget the parentheses? Pass `{method.__name__}()`."
    raise ValueError(
        f'`{name}` must be "scan", "unrolled", "kernel", a sweep (an instance of '
        f"pararnn.sweeps.AbstractSweep), or None; got {method!r}.{hint}"
    )
