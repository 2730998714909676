"""Training that is stopped and resumed gives the bits of training that is not."""

import dataclasses
import functools
import io
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import _progress
from examples._harness import (
    State,
    fit,
    load_checkpoint,
    read_metrics,
    read_options,
    save_checkpoint,
)
from examples.tasks import _train

pytestmark = pytest.mark.slow

# Two lengths, and a threshold that the first block meets: a resumed run must know its stage.
OPTIONS = _train.Options(
    "parity", cell="elman", width=4, lengths=(3, 5), batch=4, steps=100, threshold=0.01
)
RECORD = dataclasses.asdict(OPTIONS)
ADVANCE = functools.partial(_train.advance, options=OPTIONS)


def run(folder, advance=ADVANCE, **options):
    return fit(
        _train.start(OPTIONS),
        advance,
        steps=OPTIONS.steps,
        folder=folder,
        options=RECORD,
        quiet=True,
        **options,
    )


def bits(state):
    leaves = jax.tree.leaves(eqx.tree_at(lambda s: s.key, state, replace_fn=jax.random.key_data))
    return [np.asarray(x).tobytes() for x in leaves if eqx.is_array(x) or isinstance(x, int)]


def without_speed(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


def stop_after(calls, error):
    """`ADVANCE`, and an exception in the middle of a later call."""
    left = iter(range(calls))

    def advance(state):
        result = ADVANCE(state)
        if next(left, None) is None:
            raise error
        return result

    return advance


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder), folder


def test_a_run_leaves_its_files(uninterrupted):
    state, folder = uninterrupted
    assert state.step == 100 and state.stage == 1
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100]
    assert [row["length"] for row in rows] == [3, 5, 5, 5, 5]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    loaded = load_checkpoint(folder / "checkpoint.eqx", _train.start(OPTIONS), RECORD)
    assert bits(loaded) == bits(state)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.eqx",
        "metrics.jsonl",
        "metrics.png",
    ]


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_stopped_and_resumed(uninterrupted, tmp_path, calls, save_every):
    expected, folder = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after(calls, KeyboardInterrupt()), save_every=save_every)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.eqx", _train.start(OPTIONS), RECORD)
    assert checkpoint.step == 20 * calls
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == calls

    state = run(tmp_path, resume=True)
    assert bits(state) == bits(expected)
    assert without_speed(tmp_path) == without_speed(folder)


def test_rows_after_the_checkpoint_are_written_once(uninterrupted, tmp_path):
    """The machine may go down between two checkpoints, even in the middle of a row."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after(2, KeyboardInterrupt()))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "loss": 0.0}\n{"step": 80, "lo')
    run(tmp_path, resume=True)
    assert without_speed(tmp_path) == without_speed(uninterrupted[1])


def test_a_new_run_does_not_resume(uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after(2, KeyboardInterrupt()))
    assert bits(run(tmp_path)) == bits(uninterrupted[0])
    assert without_speed(tmp_path) == without_speed(uninterrupted[1])


def test_an_early_end(uninterrupted, tmp_path):
    state = run(tmp_path, done=lambda state: state.stage == 1)
    assert state.step == 20


def test_resuming_a_finished_run_does_nothing(uninterrupted, tmp_path):
    state = run(tmp_path)
    assert bits(run(tmp_path, stop_after(0, AssertionError()), resume=True)) == bits(state)


def test_more_steps_go_on_after_the_end(uninterrupted, tmp_path, capsys):
    """By the longer run's learning rates, and with the same bits if that is stopped as well."""
    expected, folder = uninterrupted
    longer = dataclasses.replace(OPTIONS, steps=140)
    advance = functools.partial(_train.advance, options=longer)
    for _ in range(2):
        expected, _ = advance(expected)

    shutil.copytree(folder, tmp_path / "a")
    state = _train.train(longer, tmp_path / "a", resume=True)
    assert capsys.readouterr().out.startswith("Goes on from step 100 to 140 instead of 100, ")
    assert state.step == 140 and bits(state) == bits(expected)
    assert [row["step"] for row in without_speed(tmp_path / "a")] == list(range(20, 141, 20))
    assert read_options(tmp_path / "a/checkpoint.eqx")["steps"] == 140

    def stop(state):
        if state.step == 120:
            raise KeyboardInterrupt
        return advance(state)

    shutil.copytree(folder, tmp_path / "b")
    options = {"steps": 140, "folder": tmp_path / "b", "options": dataclasses.asdict(longer)}
    with pytest.raises(KeyboardInterrupt):
        fit(_train.start(longer), stop, resume=True, quiet=True, **options)
    assert bits(_train.train(longer, tmp_path / "b", resume=True, quiet=True)) == bits(expected)
    assert without_speed(tmp_path / "b") == without_speed(tmp_path / "a")


def test_fewer_steps(uninterrupted, tmp_path):
    """A run that was stopped may end earlier, but not before where it is."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after(3, KeyboardInterrupt()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def resume(steps):
        options = {"steps": steps, "folder": tmp_path, "options": RECORD | {"steps": steps}}
        return fit(_train.start(OPTIONS), ADVANCE, resume=True, quiet=True, **options)

    with pytest.raises(ValueError, match="`steps` must be at least 60, as .*; got 59"):
        resume(59)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert resume(60).step == 60
    assert resume(80).step == 80


@pytest.mark.parametrize("there", [True, False])
def test_nothing_to_resume(tmp_path, there):
    folder = tmp_path if there else tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="nothing to resume: .*checkpoint.eqx does not"):
        run(folder, resume=True)
    assert not list(tmp_path.iterdir())


def test_stopped_while_saving(tmp_path, monkeypatch):
    """The checkpoint is the old one until the new one is complete."""
    path, state = tmp_path / "checkpoint.eqx", _train.start(OPTIONS)
    save_checkpoint(path, state, RECORD)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, eqx.tree_at(lambda s: s.step, state, 7), RECORD)
    assert bits(load_checkpoint(path, state, RECORD)) == bits(state)


def test_other_options_are_refused(uninterrupted):
    path = uninterrupted[1] / "checkpoint.eqx"
    with pytest.raises(ValueError, match=r"other `options`: lr=0.003, not 0.1"):
        load_checkpoint(path, _train.start(OPTIONS), RECORD | {"lr": 0.1})


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path):
    def advance(state):
        new, metrics = ADVANCE(state)
        return new, metrics | ({"loss": np.nan} if new.step == 40 else {})

    with pytest.raises(FloatingPointError, match="not finite at step 40"):
        run(tmp_path, advance)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.eqx", _train.start(OPTIONS), RECORD)
    assert checkpoint.step == 20


def test_dtypes_and_keys_survive(tmp_path):
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)
    state = State(jnp.ones(2, jnp.bfloat16), (jnp.arange(3), None), keys, 5, 1)
    save_checkpoint(tmp_path / "c", state, {})
    loaded = load_checkpoint(tmp_path / "c", state, {})
    assert bits(loaded) == bits(state) and (loaded.step, loaded.stage) == (5, 1)
    assert loaded.key.dtype == keys.dtype and loaded.model.dtype == jnp.bfloat16


# --- progress ---------------------------------------------------------------------------------


def shown(monkeypatch, terminal, seconds):
    """What a program of 100 steps writes to the standard error."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(_progress, "_SECONDS", seconds)
    with _progress.progress_bar("training", 100, note="compiling") as progress:
        for i in range(100):
            progress.set_postfix_str(f"loss {i}", refresh=False)
            progress.update()
    return stream.getvalue()


def test_a_log_has_a_line_now_and_then(monkeypatch):
    written = shown(monkeypatch, terminal=False, seconds=1e9)
    assert "\r" not in written and written.endswith("\n")
    first, last = written.splitlines()
    assert first == "training: 0 of 100 steps, 00:00 elapsed, ? left, compiling"
    assert last.startswith("training: 100 of 100 steps, ") and last.endswith(", loss 99")

    lines = shown(monkeypatch, terminal=False, seconds=0.0).splitlines()
    counts = [int(line.split()[1]) for line in lines]
    assert counts == list(range(101))


def test_a_terminal_has_a_bar(monkeypatch):
    written = shown(monkeypatch, terminal=True, seconds=1e9)
    assert written.count("\n") == 1 and "\rtraining: 100%|" in written
    assert "compiling" in written.split("\r")[1]


def test_a_run_says_that_it_compiles(tmp_path, capsys):
    def advance(state):
        return eqx.tree_at(lambda s: s.step, state, state.step + 1), {"loss": 1.0}

    state, options = State(jnp.ones(2), None, jax.random.key(0)), {"steps": 3}
    fit(state, advance, steps=3, folder=tmp_path, options=options)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(", compiling") and lines[-1].startswith("training: 3 of 3 steps, ")
    assert "loss=1, " in lines[-1]
    fit(state, advance, steps=3, folder=tmp_path, options=options, resume=True)
    assert "compiling" not in capsys.readouterr().err
