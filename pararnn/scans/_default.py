"""The scan that a platform gets by default, and the check of a user's scan."""

from typing import Any

from .._platform import chosen_platform
from .._validate import check_instance
from ._base import AbstractScan
from ._radix import Radix
from ._sequential import Sequential


def default_scan(platform: str | None = None) -> AbstractScan:
    """`Sequential()` on a CPU, where `jax.lax.scan` runs at the machine's limit; elsewhere
    `Radix()`, which launches the fewest kernels and moves the fewest bytes."""
    return Sequential() if chosen_platform(platform) == "cpu" else Radix()


def check_scan(name: str, scan: Any) -> None:
    """Raises a `TypeError` that calls the argument `name` unless `scan` is a scan or None."""
    instances = "`pararnn.scans.Sequential()`, `Associative()` or `Radix()`"
    check_instance(name, scan, AbstractScan, instances)
