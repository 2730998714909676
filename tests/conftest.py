"""Strict settings for every test, made before the package is imported.

- float64 is on; a float32 test asks for float32 by name.
- Types are never promoted silently, ranks neither.
- The jaxtyping annotations of the package are checked at each call.
- The CPU is used unless `JAX_PLATFORMS` says otherwise.

Compiling takes nearly all of the time. Most optimisations of XLA are therefore off, unless a test
asks for them by the fixture `optimised`, and what was compiled is kept in the environment, for the
next run and for the programs that tests start.
"""

import gc
import importlib.metadata
import itertools
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ and sys.prefix != sys.base_prefix:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(sys.prefix) / "jax-cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Of the two code generators that these releases have, the older one compiles in two thirds of the
# time. Later releases have one, and end at a flag that they do not know.
OLDER = "--xla_cpu_use_fusion_emitters=false"
FLAGS = os.environ.get("XLA_FLAGS", "")  # a process that runs tests for another has them already
if importlib.metadata.version("jaxlib").startswith("0.10.") and OLDER not in FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} {OLDER}".strip()
# Programs do not tell from which lines their operations come: that takes a twentieth of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402 (its settings are made above)
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
if os.environ["JAX_PLATFORMS"] != "cpu":  # a GPU would multiply float32 in ten bits
    jax.config.update("jax_default_matmul_precision", "highest")

# Must come before the first import of the package: it rewrites modules while they are loaded.
jaxtyping.install_import_hook("pararnn", "beartype.beartype")


def pytest_collection_finish():
    """What was imported stays. Tracing makes many objects and few cycles: looking for these less
    often spares a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def optimised():
    """Programs are compiled as users compile them, for tests of what a compiled program takes."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def as_users_run_it():
    """Without the type checks of the tests, which take time and refuse wrong arguments first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


MAPS = pathlib.Path("/proc/self/maps")
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """A process may hold only so many memory maps (65,530, by default), and each compiled program
    takes a few. Looked at now and then, as looking takes time; where the system tells no number,
    programs are dropped as often."""
    yield
    if next(TESTS) % 20 == 0:
        if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > 30_000:
            jax.clear_caches()
