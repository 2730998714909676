"""A training loop that can be stopped at any time and resumed exactly.

All that changes in training is a `State`. A training program supplies `advance`, a pure function
from one state to the next, so that a run that was stopped and resumed gives the very bits of a run
that was not.
"""

import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree
from matplotlib.figure import Figure

from ._progress import progress_bar

Metrics = dict[str, float]
CHECKPOINT, METRICS, PLOT = "checkpoint.eqx", "metrics.jsonl", "metrics.png"
_FREE = ("steps",)  # the options that may be others when a run is resumed


class State(eqx.Module):
    """All that changes in training.

    - `model`, `moments`: the weights and the state of the optimiser.
    - `key`: of everything random that is still to come.
    - `step`: how many steps have been taken.
    - `stage`: the position in a curriculum, if there is one.
    """

    model: PyTree
    moments: PyTree
    key: PRNGKeyArray
    step: int = 0
    stage: int = 0


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(path: pathlib.Path, state: PyTree, options: dict[str, Any]) -> None:
    """Writes one line of JSON, the options, then all arrays and numbers of `state`, typed keys
    too. The file at `path` is replaced at once: it is the old one or the new one at any time."""
    memory = io.BytesIO()
    memory.write((json.dumps(options) + "\n").encode())
    eqx.tree_serialise_leaves(memory, state, _write_leaf)
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        file.write(memory.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(
    path: pathlib.Path, like: PyTree, options: dict[str, Any], free: Collection[str] = ()
) -> PyTree:
    """Reads what `save_checkpoint` wrote. `like` has the structure, shapes and dtypes of the state.

    Raises ValueError if the file was written with other options, but for those named in `free`.
    """
    _check_options(path, options, free)
    with open(path, "rb") as file:
        file.readline()
        return eqx.tree_deserialise_leaves(file, like, _read_leaf)


def read_options(path: pathlib.Path) -> dict[str, Any]:
    """The options that a checkpoint was written with."""
    with open(path, "rb") as file:
        return json.loads(file.readline())


def check_resumable(folder: pathlib.Path, options: dict[str, Any]) -> None:
    """Raises as `fit` does if there is nothing in `folder` to resume, or a run with others than
    `options`. Nothing is asked of JAX."""
    checkpoint = folder / CHECKPOINT
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"There is nothing to resume: {checkpoint} does not exist. Start without `resume`."
        )
    _check_options(checkpoint, options, _FREE)


def _check_options(path: pathlib.Path, options: dict[str, Any], free: Collection[str]) -> None:
    written = read_options(path)
    wanted = json.loads(json.dumps(options))  # tuples become lists
    names = [k for k in {**written, **wanted} if written.get(k) != wanted.get(k)]
    names = [k for k in names if k not in free]
    if names:
        pairs = ", ".join(f"{k}={written.get(k)!r}, not {wanted.get(k)!r}" for k in names)
        raise ValueError(f"{path} is of a run with other `options`: {pairs}.")


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _write_leaf(file: Any, leaf: Any) -> None:
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    eqx.default_serialise_filter_spec(file, leaf)


def _read_leaf(file: Any, leaf: Any) -> Any:
    if not _is_key(leaf):
        return eqx.default_deserialise_filter_spec(file, leaf)
    data = eqx.default_deserialise_filter_spec(file, jax.random.key_data(leaf))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))


# --- metrics --------------------------------------------------------------------------------------


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def plot_metrics(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Draws the loss and the accuracy of every row that has them."""
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, colour in zip(
        panels, ("loss", "accuracy"), ("#0072b2", "#d55e00"), strict=True
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.02)
    panels[1].set_xlabel("training step")
    figure.savefig(path)


def _resumed(
    folder: pathlib.Path, like: State, steps: int, options: dict[str, Any]
) -> tuple[State, int]:
    """The state of the checkpoint in `folder`, and at how many steps its run was to end."""
    check_resumable(folder, options)
    checkpoint = folder / CHECKPOINT
    state = load_checkpoint(checkpoint, like, options, _FREE)
    if state.step > steps:
        raise ValueError(
            f"`steps` must be at least {state.step}, as {checkpoint} has come so far; got {steps}."
        )
    return state, read_options(checkpoint).get("steps", steps)


# --- the loop -------------------------------------------------------------------------------------


class _Files:
    """What a run writes; nothing if there is no folder."""

    def __init__(self, folder: pathlib.Path | None, options: dict[str, Any]):
        self.folder = folder
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.saved = -math.inf

    def begin(self, state: State, resume: bool) -> None:
        """What was reported before `state` stays; what came after it will be reported again."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / METRICS
        if resume:
            self.rows = [row for row in read_metrics(log) if row["step"] <= state.step]
        log.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        # The stale checkpoint of another run must not outlive the first moment of this one.
        self.save(state)

    def report(self, row: dict[str, Any]) -> None:
        if self.folder is not None:
            with open(self.folder / METRICS, "a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows.append(row)

    def save(self, state: State, every: float = 0.0) -> None:
        """Writes a checkpoint, if the last one is `every` seconds old."""
        if self.folder is not None and time.monotonic() - self.saved >= every:
            save_checkpoint(self.folder / CHECKPOINT, state, self.options)
            self.saved = time.monotonic()

    def end(self) -> None:
        if self.folder is not None:
            plot_metrics(self.folder / PLOT, self.rows)


def fit(
    state: State,
    advance: Callable[[State], tuple[State, Metrics]],
    *,
    steps: int,
    done: Callable[[State], bool] = lambda state: False,
    folder: pathlib.Path | None,
    options: dict[str, Any],
    resume: bool = False,
    share: Callable[[State], State] = lambda state: state,
    save_every: float = 30.0,
    description: str = "training",
    quiet: bool = False,
) -> State:
    """Advances `state` until `state.step` is at least `steps`, or `done(state)`.

    **Arguments:**

    - `state`: where to start.
    - `advance`: from a state to one with a larger `step`, and what to report of the way, which must
        have a `"loss"`. It may depend on nothing that changes but its argument.
    - `steps`, `done`: when to end.
    - `folder`: gets `checkpoint.eqx`, `metrics.jsonl` with one JSON object per call of `advance`,
        and, at the end, `metrics.png`. None: nothing is written, as by all but the first of several
        processes.
    - `options`: what the run depends on, stored with the checkpoint. Resuming with others is
        refused, but for other `"steps"`, from which a run goes on by the new ones.
    - `resume`: whether to continue from the checkpoint in `folder`.
    - `share`: called once, with the state to start from; with several processes, all of which call
        `fit`, it hands that of the first, who alone has a folder, to all.
    - `save_every`: seconds between two checkpoints. There is one more at the end, and one when the
        run ends by an exception, Ctrl-C among them.
    - `description`, `quiet`: of the progress bar.

    **Returns:**

    The last state. Raises FloatingPointError at a loss that is not finite; the checkpoint then
    holds the last state before it. Raises FileNotFoundError if there is nothing to resume, and
    ValueError if it has gone further than `steps`.
    """
    planned = steps
    if resume and folder is not None:
        state, planned = _resumed(folder, state, steps, options)
    state = share(state)
    files = _Files(folder, options)
    files.begin(state, resume)
    goes_on = state.step < steps and not done(state)
    if goes_on and planned != steps and not quiet:
        print(
            f"Goes on from step {state.step} to {steps} instead of {planned}, with the learning "
            f"rates of a run of {steps} steps.\nThe steps so far had others, so the end is not "
            "that of such a run from its start.",
            flush=True,
        )
    note = "compiling" if goes_on else ""
    with progress_bar(description, steps, initial=state.step, note=note, quiet=quiet) as progress:
        try:
            while state.step < steps and not done(state):
                start = time.perf_counter()
                new, metrics = advance(state)
                if not math.isfinite(metrics["loss"]):
                    raise FloatingPointError(
                        f"The loss is not finite at step {new.step}; try a smaller learning rate."
                    )
                speed = (new.step - state.step) / (time.perf_counter() - start)
                row = {"step": new.step, **metrics, "steps_per_second": round(speed, 2)}
                # The row comes first: stopped in between, the row is dropped when resuming.
                files.report(row)
                shown = {k: f"{v:.3g}" for k, v in row.items() if k != "step"}
                progress.set_postfix(shown, refresh=False)
                progress.update(new.step - state.step)
                state = new
                files.save(state, every=save_every)
        finally:
            files.save(state)
    files.end()
    return state
