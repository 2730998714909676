"""The import starts no devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_jax_is_not_started_by_the_import():
    """Nor by a solver's settings: how many devices there are, and of which processes, is told to
    JAX before it starts."""
    program = (
        "import jax, pararnn as prnn\n"
        "solvers = prnn.Newton(), prnn.AssociativeScan(), prnn.Speculative(), prnn.Sequential()\n"
        "prnn.ClippedAdjoint(1.0)\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # raises once JAX has started
        "assert jax.device_count() == 3"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
