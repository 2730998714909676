"""Time on several devices: solves, derivatives, layers and tools, against one device.

All in files that end in `on_a_cut_line.py`, each once and in a process of its own: how many devices
JAX sees is settled when it starts.
"""

import pathlib

import jax.numpy as jnp
import pytest
import several_devices

import pararnn as prnn

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "least"),
    [("on_a_cut_line", 42), ("layers_on_a_cut_line", 12), ("tools_on_a_cut_line", 7)],
)
def test_time_on_several_devices(script, least):
    """One test for all checks of a file, as several processes that run tests would each make
    them."""
    found, run = several_devices.outcomes(TESTS / f"{script}.py")
    assert len(found) >= least and run.returncode == 0, run.stderr[-4000:]
    wrong = {name: error for name, error in found.items() if error is not None}
    assert not wrong, wrong


def step(h, x):
    return jnp.tanh(0.5 * h + x)


def test_a_mesh_with_that_axis_is_needed():
    with pytest.raises(ValueError, match="needs a mesh with this axis, but there is no mesh"):
        prnn.solve(step, jnp.ones((4, 1)), jnp.ones(1), solver=prnn.TimeSharded("time"))


def test_wrong_arguments(as_users_run_it):
    with pytest.raises(TypeError, match="`axis` must be the name"):
        prnn.TimeSharded(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="other than TimeSharded"):
        prnn.TimeSharded("time", prnn.TimeSharded("time"))
    with pytest.raises(ValueError, match="cut time along different axes"):
        solver, adjoint = prnn.TimeSharded("a"), prnn.TimeSharded("b")
        prnn.solve(step, jnp.ones((4, 1)), jnp.ones(1), solver=solver, adjoint=adjoint)
