"""The platform that JAX runs on."""

import os

import jax

# JAX's names of a platform; `gpu` is what its default backend is called on CUDA and ROCm.
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def chosen_platform(platform: str | None) -> str:
    """The platform that a caller names, or for None that on which JAX makes arrays."""
    return jax.default_backend() if platform is None else platform


def check_platform(platform: str | None) -> str:
    """`platform`, or the default for None; raises for what is neither."""
    if platform is None:
        return chosen_platform(None)
    if not isinstance(platform, str):
        raise TypeError(f"`platform` must be a string or None; got {platform!r}.")
    if platform not in (*PLATFORMS, chosen_platform(None)):
        raise ValueError(f"`platform` must be one of {PLATFORMS} or None; got {platform!r}.")
    return platform


def kernels_enabled(platform: str | None) -> bool:
    """Whether generated kernels are used on a platform where nothing else is asked for: on CUDA, if
    JAX has one device; with the environment variable `PARARNN_KERNELS` 1, also if it has several,
    over which it could not spread a kernel; with 0, never.

    Raises a `ValueError` for a value that is neither 0 nor 1.
    """
    value = os.environ.get("PARARNN_KERNELS")
    if value not in (None, "0", "1"):
        raise ValueError(f"The environment variable PARARNN_KERNELS must be 0 or 1; got {value!r}.")
    if chosen_platform(platform) not in ("cuda", "gpu"):
        return False
    return jax.device_count() == 1 if value is None else value == "1"
