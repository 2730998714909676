"""The scans that have a name, and which one a platform gets."""

from typing import Any, Literal

from .._platform import chosen_platform
from ._associative import Associative
from ._base import AbstractScan
from ._radix import Radix
from ._sequential import Sequential

LinearMethod = Literal["sequential", "associative", "radix"]
_NAMED: dict[str, AbstractScan] = {
    "sequential": Sequential(),
    "associative": Associative(),
    "radix": Radix(),
}


def default_linear_method(platform: str | None = None) -> LinearMethod:
    """`"sequential"` on CPU, where `jax.lax.scan` runs at the machine's limit; elsewhere
    `"radix"`, which launches the fewest kernels and moves the fewest bytes."""
    return "sequential" if chosen_platform(platform) == "cpu" else "radix"


def as_scan(name: str, method: Any) -> AbstractScan:
    """The scan that `method` stands for; for None, that of the platform.

    Raises a `ValueError` that calls the argument `name` for anything else.
    """
    if method is None:
        method = default_linear_method()
    if isinstance(method, AbstractScan):
        return method
    if isinstance(method, str) and method in _NAMED:
        return _NAMED[method]
    raise ValueError(
        f'`{name}` must be "sequential", "associative", "radix", a scan (an instance of '
        f"pararnn.scans.AbstractScan), or None; got {_shown(method)}."
    )


def check_scan(name: str, method: Any) -> None:
    """As `as_scan` raises. Of None it asks nothing: a solver may be made before JAX starts."""
    if method is not None:
        as_scan(name, method)


def _shown(method: Any) -> str:
    hint = ""
    if isinstance(method, type) and issubclass(method, AbstractScan):
        hint = f" Did you forget the parentheses? Pass `{method.__name__}()`"
    return f"{method!r}{hint}"
