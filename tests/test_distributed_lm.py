"""Training on several devices, in one process or in two: the loss curve of one device."""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import equinox as eqx
import jax
import numpy as np
import pytest

import pararnn as prnn
from examples import distributed_lm
from examples._harness import read_metrics
from examples._language_model import (
    LanguageModel,
    bits_per_character,
    load,
    make_optimiser,
    predict,
    update,
    with_solver,
)
from examples._mesh import make_mesh, windows
from examples._text import load_text

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(distributed_lm.__file__).parents[1]
LENGTH, BATCH, STEPS = 64, 32, 40
TINY = f"--width 8 --depth 1 --length {LENGTH} --batch {BATCH} --save-every 0.001 --steps {STEPS}"
# How much losses of float32 may differ on another mesh, after as many steps as STEPS.
ROUNDING = 1e-5


def started(flags, folder):
    """The program, in a process of its own."""
    command = [sys.executable, "-m", "examples.distributed_lm", *TINY.split(), *flags.split()]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*command, "--output", folder],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.asarray([row["loss"] for row in rows])


@functools.cache
def expected():
    """The losses by a plain scan on one device."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        text = load_text()
        key = jax.random.split(jax.random.key(0))[0]
        model = LanguageModel("diagonal-gru", text.vocabulary, 8, 1, key=key)
        model = with_solver(model, prnn.Sequential(), prnn.Sequential())
        optimiser = make_optimiser(4e-3, STEPS)
        moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, moments, pieces):
            def loss_of(model):
                return bits_per_character(predict(model, pieces), pieces)

            loss, gradients = eqx.filter_value_and_grad(loss_of)(model)
            return *update(optimiser, model, moments, gradients), loss

        curve = []
        for i in range(STEPS):
            starts = np.random.default_rng((0, i)).integers(0, len(text.train) - LENGTH, BATCH)
            pieces = np.stack([text.train[start : start + LENGTH + 1] for start in starts])
            model, moments, loss = step(model, moments, pieces)
            curve.append(float(loss))
    return np.asarray(curve)


def test_two_processes_are_stopped_and_one_continues(tmp_path):
    """SIGTERM to one process ends both at the same step; the checkpoint fits any mesh."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = f"--coordinator {address} --num-processes 2 --cpu-devices 2 --mesh 2,2 --process-id"
    folders = tmp_path / "first", tmp_path / "other"
    runs = [started(f"{flags} {i}", folder) for i, folder in enumerate(folders)]
    try:
        while len(read_metrics(folders[0] / "metrics.jsonl")) < 3:
            assert all(run.poll() is None for run in runs), [run.communicate() for run in runs]
            time.sleep(0.002)
        runs[1].send_signal(signal.SIGTERM)
        (printed, errors), (other, _) = (run.communicate(timeout=300) for run in runs)
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [distributed_lm.STOPPED] * 2, errors
    done = len(losses(folders[0]))
    assert 3 <= done < STEPS and f"Stopped at step {done}. Continue with --resume." in printed
    assert "Stopped" not in other and not list(folders[1].iterdir()), "process 0 alone writes"

    run = started("--cpu-devices 4 --mesh 2,2 --resume", folders[0])
    printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert "Held-out text:" in printed and (folders[0] / "metrics.png").exists()
    np.testing.assert_allclose(losses(folders[0]), expected(), rtol=ROUNDING)
    model, _ = load(folders[0] / "model.eqx")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    with pytest.raises(SystemExit, match="is of a run with other `options`: width=8, not 9"):
        other_flags = [*TINY.replace("--width 8", "--width 9").split(), "--resume"]
        distributed_lm.main([*other_flags, "--output", str(folders[0])])


def test_windows():
    tokens = np.arange(100, dtype=np.int32)
    inputs, targets = windows(make_mesh(1, 1), tokens, np.asarray([3, 50, 90]), 4)
    np.testing.assert_array_equal(inputs, [[3, 4, 5, 6], [50, 51, 52, 53], [90, 91, 92, 93]])
    np.testing.assert_array_equal(targets, inputs + 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mesh 2", "--mesh: must be two whole numbers, such as 2,4; got '2'"),
        ("--mesh 0,4", "--mesh: must be two whole numbers"),
        ("--save-every 0", "--save-every: must be a number above 0"),
        ("--length 1000000", "--length: must be at most"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        distributed_lm.main(flags.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SystemExit, match="There is nothing to resume"):
        distributed_lm.main(["--resume", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mesh 2,4", "--mesh 2,4 needs 8 devices; there are 4"),
        ("--mesh 4,1 --batch 6", "--batch 6 cannot be cut into 4 equal parts, as the mesh 4,1"),
        ("--length 63", "--length 63 cannot be cut into 2 equal parts, as the mesh 2,2"),
    ],
)
def test_the_mesh_must_fit(flags, message):
    options = distributed_lm.make_parser().parse_args(flags.split())
    with pytest.raises(SystemExit, match=message):
        distributed_lm.choose_mesh(options, 2, 4)
