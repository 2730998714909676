"""Checks of settings, made when a solver or an adjoint is constructed."""

from typing import Any


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a Python int or None; got {value!r}.")


def check_positive_int(name: str, value: Any) -> None:
    _check_int(name, value)
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")


def check_count(name: str, value: Any) -> None:
    _check_int(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must not be negative; got {value}.")


def check_tolerance(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a Python float or None; got {value!r}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be finite and not negative; got {value}.")


def check_instance(name: str, value: Any, base: type, instances: str) -> None:
    """Raises a `TypeError` unless `value` is an instance of `base` or None; `instances` tells which
    ones the package has."""
    if value is None or isinstance(value, base):
        return
    hint = ""
    if isinstance(value, type) and issubclass(value, base):
        hint = f" Did you forget the parentheses? Pass `{value.__name__}()`."
    raise TypeError(
        f"`{name}` must be {instances}, another instance of {base.__name__}, or None; "
        f"got {value!r}.{hint}"
    )
