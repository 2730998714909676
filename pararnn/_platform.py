"""The one place that asks JAX where it runs."""

import jax

# JAX's names of a platform; `gpu` is what its default backend is called on CUDA and ROCm.
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def default_platform() -> str:
    """The platform that arrays are made on, unless a caller names another."""
    return jax.default_backend()


def check_platform(platform: str | None) -> str:
    """`platform`, or the default for None; raises for what is neither."""
    default = default_platform()
    if platform is None:
        return default
    if not isinstance(platform, str):
        raise TypeError(f"`platform` must be a string or None; got {platform!r}.")
    if platform not in (*PLATFORMS, default):
        raise ValueError(f"`platform` must be one of {PLATFORMS} or None; got {platform!r}.")
    return platform
