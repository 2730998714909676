"""The scans that have a name, and which one a platform gets."""

from typing import Any, Literal

from .._platform import chosen_platform
from ._associative import Associative
from ._base import AbstractScan
from ._chunked import Chunked
from ._sequential import Sequential

LinearMethod = Literal["sequential", "associative", "chunked"]
_NAMED: dict[str, AbstractScan] = {
    "sequential": Sequential(),
    "associative": Associative(),
    "chunked": Chunked(),
}
# From this length on, the chunked form replaces the associative scan on accelerators: it compiles
# about log2(length / sqrt(length)) levels less, and touches memory a fixed number of times.
_CHUNKED_FROM = 2048


def default_linear_method(length: int, platform: str | None = None) -> LinearMethod:
    """`"sequential"` on CPU, where `jax.lax.scan` runs at the machine's limit; elsewhere
    `"associative"`, or `"chunked"` for long recurrences."""
    if chosen_platform(platform) == "cpu":
        return "sequential"
    return "associative" if length < _CHUNKED_FROM else "chunked"


def as_scan(name: str, method: Any, length: int = 0) -> AbstractScan:
    """The scan that `method` stands for; for None, that of the platform for so many elements.

    Raises a `ValueError` that calls the argument `name` for anything else.
    """
    if method is None:
        method = default_linear_method(length)
    if isinstance(method, AbstractScan):
        return method
    if isinstance(method, str) and method in _NAMED:
        return _NAMED[method]
    raise ValueError(
        f'`{name}` must be "sequential", "associative", "chunked", a scan (an instance of '
        f"pararnn.scans.AbstractScan), or None; got {_shown(method)}."
    )


def _shown(method: Any) -> str:
    hint = ""
    if isinstance(method, type) and issubclass(method, AbstractScan):
        hint = f" Did you forget the parentheses? Pass `{method.__name__}()`"
    return f"{method!r}{hint}"
