"""Training in several processes: the loss curve of one, whoever dies on the way.

Each test starts real processes, which compile for themselves; so few tests ask many questions.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
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
from examples._launch import LOST, STOPPED, free_port
from examples._mesh import make_mesh, windows
from examples._text import load_text

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(distributed_lm.__file__).parents[1]
LENGTH, BATCH, STEPS = 64, 32, 40
TINY = f"--width 8 --depth 1 --length {LENGTH} --batch {BATCH} --save-every 0.001"
TWO_BY_TWO = "--processes 2 --devices-per-process 2 --mesh 2,2"
# How much losses of float32 may differ on another mesh, after as many steps as STEPS.
ROUNDING = 1e-5
needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/environ").exists(), reason="finds processes by /proc"
)


class Run:
    """The program, started in a folder."""

    def __init__(self, flags, folder, steps=STEPS):
        self.folder = folder
        flags = f"{TINY} --steps {steps} {flags}"
        command = [sys.executable, "-m", "examples.distributed_lm", *flags.split()]
        env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
        self.errors = open(folder.with_suffix(".err"), "w+")
        self.process = subprocess.Popen(
            [*command, "--output", folder],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def end(self, timeout=300):
        """The exit status, and what was said on the standard output and error."""
        try:
            printed = self.process.communicate(timeout=timeout)[0]
        finally:
            self.process.kill()
        with self.errors as errors:
            errors.seek(0)
            return self.process.returncode, printed, errors.read()

    def steps(self):
        return len(read_metrics(self.folder / "metrics.jsonl"))

    def wait_for_steps(self, steps):
        deadline = time.monotonic() + 300
        while self.steps() < steps:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def child(self, index):
        """The number that the system gives to process `index` of those that train."""
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environ = (folder / "environ").read_text(errors="replace").split("\0")
            except OSError:  # not ours, or it has ended just now
                continue
            place = next((x for x in environ if x.startswith("EXAMPLES_PLACE=")), None)
            if parent == self.process.pid and place is not None:
                if json.loads(place.partition("=")[2])["index"] == index:
                    return int(folder.name)
        raise AssertionError(f"there is no process {index}")


def losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.asarray([row["loss"] for row in rows])


def finished(outcome, folder):
    """The losses of a run that has come to its end."""
    status, printed, errors = outcome
    assert status == 0, errors
    assert printed.count("Held-out text:") == 1, "only the first process may speak"
    assert (folder / "metrics.png").exists()
    curve = losses(folder)
    assert len(curve) == STEPS
    return curve


@functools.cache
def expected(steps=STEPS, total=STEPS):
    """The losses of the first `steps` of `total`, by a plain scan on one device."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        text = load_text()
        key = jax.random.split(jax.random.key(0))[0]
        model = LanguageModel("diagonal-gru", text.vocabulary, 8, 1, key=key)
        model = with_solver(model, prnn.Sequential(), prnn.Sequential())
        optimiser = make_optimiser(4e-3, total)
        moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, moments, pieces):
            def loss_of(model):
                return bits_per_character(predict(model, pieces), pieces)

            loss, gradients = eqx.filter_value_and_grad(loss_of)(model)
            return *update(optimiser, model, moments, gradients), loss

        curve = []
        for i in range(steps):
            starts = np.random.default_rng((0, i)).integers(0, len(text.train) - LENGTH, BATCH)
            pieces = np.stack([text.train[start : start + LENGTH + 1] for start in starts])
            model, moments, loss = step(model, moments, pieces)
            curve.append(float(loss))
    return np.asarray(curve)


@needs_proc
def test_killed_and_resumed(tmp_path):
    """Process 0 dies: it holds the run together, and it alone writes."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    curve = finished(Run(TWO_BY_TWO, whole).end(), whole)
    np.testing.assert_allclose(curve, expected(), rtol=ROUNDING)
    model, _ = load(whole / "model.eqx")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))

    run = Run(TWO_BY_TWO, folder)
    run.wait_for_steps(1)
    victim = run.child(0)
    run.wait_for_steps(5)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    status, _, errors = run.end()
    assert time.monotonic() - killed < 60
    assert status == 128 + signal.SIGKILL
    assert "error: process 0 of 2 was killed by signal 9 (SIGKILL)." in errors
    assert "That ended process 1 of 2.\nGo on from the last checkpoint: " in errors
    assert "--resume" in errors.splitlines()[-1]
    assert 5 <= run.steps() < STEPS

    resumed = finished(Run(f"{TWO_BY_TWO} --resume", folder).end(), folder)
    np.testing.assert_array_equal(resumed, curve)


def test_stopped_and_resumed_in_one_process(tmp_path):
    """By Ctrl-C, twice. JAX looks for it each second, and says at which step to end."""
    flags, folder, total = "--devices-per-process 4 --mesh 2,2", tmp_path / "stopped", 10**6
    done = 0
    for more in ("", " --resume"):
        run = Run(flags + more, folder, total)
        run.wait_for_steps(done + 5)
        run.process.send_signal(signal.SIGINT)
        status, printed, errors = run.end()
        assert status == STOPPED, errors
        done = run.steps()
        assert f"Stopped at step {done}. Go on with --resume." in printed
    rounding = ROUNDING * max(1, done / STEPS)
    np.testing.assert_allclose(losses(folder), expected(done, total), rtol=rounding)


@needs_proc
def test_a_command_for_each_process(tmp_path):
    """As on several machines. One dies, and the other's command tells; then one device goes on."""
    folder = tmp_path / "hosts"
    there = f"--coordinator localhost:{free_port()} --num-processes 2 --devices-per-process 2"
    (tmp_path / "other").mkdir()
    runs = [
        Run(f"{there} --mesh 1,4 --process-id {i}", path)
        for i, path in enumerate((folder, tmp_path / "other" / "hosts"))
    ]
    runs[0].wait_for_steps(1)
    victim = runs[1].child(1)
    runs[0].wait_for_steps(5)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    outcomes = [run.end() for run in runs]
    assert time.monotonic() - killed < 60
    (status, _, errors), (other_status, printed, other_errors) = outcomes
    assert other_status == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was killed by signal 9 (SIGKILL)." in other_errors
    assert printed == "" and "training:" not in other_errors, "only the first may speak"
    assert not list((tmp_path / "other" / "hosts").iterdir()), "only the first may write"
    assert status in (LOST, 128 + signal.SIGABRT)
    assert "error: process 0 of 2 lost the others: one of them has died" in errors
    assert "--resume" in errors.splitlines()[-1]

    curve = finished(Run("--resume", folder).end(), folder)
    np.testing.assert_allclose(curve, expected(), rtol=ROUNDING)
    shutil.copytree(folder, tmp_path / "finished")
    with pytest.raises(SystemExit, match="is of a run with other `options`: width=8, not 9"):
        flags = [*TINY.replace("--width 8", "--width 9").split(), "--resume"]
        distributed_lm.main([*flags, "--output", str(tmp_path / "finished")])


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
