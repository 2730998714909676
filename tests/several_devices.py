"""What the checks on several devices share, each file of which runs in a process of its own: how
many devices JAX sees is settled when it starts."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping

import jax


def start(count: int) -> None:
    """Settles that JAX is to start on so many CPU devices, as the tests use it."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    warnings.simplefilter("error")


def run_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Makes the checks whose names match the first argument of the command line, or all; prints
    one line of JSON for each: its name, what went wrong or null, and the CPU seconds it took."""
    chosen = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    for name, run in checks.items():
        if not chosen.search(name):
            continue
        error, before = None, time.process_time()
        try:
            run()
        except BaseException:  # what raised is what the parent reports
            error = traceback.format_exc()
        seconds = round(time.process_time() - before, 1)
        print(json.dumps({"check": name, "error": error, "seconds": seconds}), flush=True)


def outcomes(
    script: pathlib.Path,
) -> tuple[dict[str, str | None], subprocess.CompletedProcess[str]]:
    """What went wrong, or None, in each check of a file; and the process that made them."""
    env = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"check"')]
    return {found["check"]: found["error"] for found in map(json.loads, lines)}, run
