"""The ways to sweep that have a name, and which one a platform gets."""

from typing import Any, Literal

from .._platform import chosen_platform
from ._base import AbstractSweep
from ._scanned import Scanned
from ._unrolled import Unrolled

SweepMethod = Literal["scan", "unrolled"]
_NAMED: dict[str, AbstractSweep] = {"scan": Scanned(), "unrolled": Unrolled()}
# Kernels of more steps need more registers than there are.
MOST_UNROLLED = 32


def default_sweep_method(num_steps: int, platform: str | None = None) -> SweepMethod:
    """`"scan"` on a CPU, and for chunks of more than 32 steps; elsewhere `"unrolled"`."""
    if chosen_platform(platform) == "cpu" or num_steps > MOST_UNROLLED:
        return "scan"
    return "unrolled"


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
        f'`{name}` must be "scan", "unrolled", a sweep (an instance of '
        f"pararnn.sweeps.AbstractSweep), or None; got {method!r}.{hint}"
    )
