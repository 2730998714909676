"""Several devices: a batch that is spread over them, with gradients, against one device.

All in `on_devices.py`, once and in a process of its own: how many devices JAX sees is settled when
it starts.
"""

import os
import pathlib
import re
import subprocess
import sys

import several_devices

SCRIPT = pathlib.Path(__file__).parent / "on_devices.py"
_SOURCE = SCRIPT.read_text()
NAMES = re.findall(r'^(?:agrees|same_iterations)\(\s*"([^"]+)"', _SOURCE, re.MULTILINE)
NAMES += re.findall(r'^CHECKS\["([^"]+)"\]', _SOURCE, re.MULTILINE)
NAMES += re.findall(r"^@check\ndef (\w+)", _SOURCE, re.MULTILINE)


def test_on_several_devices():
    """One test for all checks, as several processes that run tests would each make them."""
    found, run = several_devices.outcomes(SCRIPT)
    assert found.keys() == set(NAMES), run.stderr[-4000:]
    wrong = {name: error for name, error in found.items() if error is not None}
    assert not wrong, wrong


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
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
