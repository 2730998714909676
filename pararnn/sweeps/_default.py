"""The sweep that a platform gets by default, and the check of a user's sweep."""

from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._platform import chosen_platform, kernels_enabled
from .._validate import check_instance
from ..kernels import unsupported
from ._base import AbstractSweep, Step
from ._scanned import Scanned
from ._unrolled import MOST_UNROLLED, Unrolled


def default_sweep(num_steps: int, platform: str | None = None) -> AbstractSweep:
    """`Scanned()` on a CPU, and for chunks of more than 32 steps; elsewhere `Unrolled()`."""
    if chosen_platform(platform) == "cpu" or num_steps > MOST_UNROLLED:
        return Scanned()
    return Unrolled()


def uses_kernel(step: Step, init: PyTree[Any], xs: PyTree[Any], platform: str | None) -> bool:
    """Whether `Fused()` replaces the default sweep: kernels are enabled, and one can be generated
    for this step."""
    return kernels_enabled(platform) and why_no_kernel(step, init, xs) is None


def why_no_kernel(step: Step, init: PyTree[Any], xs: PyTree[Any]) -> str | None:
    """Why no kernel can be generated for the step of a recurrence, or `None` if one can."""
    start = jtu.tree_map(lambda h: jax.ShapeDtypeStruct((1, *h.shape), h.dtype), init)
    return unsupported(step, start, xs)


def check_sweep(name: str, sweep: Any) -> None:
    """Raises a `TypeError` that calls the argument `name` unless `sweep` is a sweep or None."""
    instances = (
        "`pararnn.sweeps.Scanned()` (a loop), `Unrolled()` (all steps written out) or `Fused()` "
        "(one kernel)"
    )
    check_instance(name, sweep, AbstractSweep, instances)
