"""`python -m examples.tables NAME`: trains all models of a table, and writes it.

The table goes to the terminal in Markdown, and to `NAME.json` and `NAME.png` in the output folder.
Ctrl-C stops it; the same command with `--resume` goes on.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from matplotlib.figure import Figure

import pararnn as prnn

from . import _tracking
from ._harness import CHECKPOINT, METRICS, read_metrics
from ._model import SequenceModel, with_solver
from .tasks import TASKS, Task
from .tasks import _recall as recall
from .tasks._train import Options, evaluate, train

RESULT = "result.json"  # of a model that was trained and tested
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Row(NamedTuple):
    """One model of a table.

    - `options`: of its training.
    - `tests`: the columns, each a task and a length to measure the accuracy at.
    - `target`: the accuracy that the first test must reach, or the next seed is tried.
    - `seeds`: how many seeds are tried at most.
    - `batch`: sequences in a test.
    - `solver`: for the tests; None: the one of the training.
    """

    options: Options
    tests: dict[str, tuple[Task, int]]
    target: float = 1.0
    seeds: int = 1
    batch: int = 64
    solver: prnn.AbstractSolver | None = None


def synthetic() -> list[Row]:
    """Three tasks at length 100 with one layer of 64 units, solved by Newton's method."""
    shared: dict[str, Any] = {"solver": "newton", "batch": 32, "stop": 0.9995}
    recipes = {
        "parity": {"lengths": (10, 100), "threshold": 0.9, "steps": 1000, "lr": 5e-3},
        "keep-nth": {
            "lengths": (8, 100),
            "threshold": 0.9,
            "steps": 800,
            "lr": 1e-2,
            "conv": 4,
            "mlp": True,
        },
        "k-hop": {
            "lengths": (12, 24, 50, 100),
            "threshold": 0.93,
            "steps": 4000,
            "lr": 1e-2,
            "conv": 4,
            "mlp": True,
        },
    }
    rows = []
    for task, recipe in recipes.items():
        for cell in ("diagonal-gru", "diagonal-lstm"):
            options = Options(task, cell, **(shared | recipe))
            tests = {"accuracy": (TASKS[task], 100)}
            target = 1.0 if task == "parity" else 0.99
            rows.append(Row(options, tests, target, seeds=3))
    return rows


def s3() -> list[Row]:
    """The word problem of S3, trained up to length 128 and tested beyond it."""
    shared: dict[str, Any] = {"lengths": (8, 32, 128), "batch": 32}
    tests = {str(length): (TASKS["s3"], length) for length in (128, 512, 2048)}
    return [
        Row(Options("s3", "gru", steps=300, lr=5e-3, **shared), tests, seeds=2),
        Row(Options("s3", "m2rnn", steps=600, lr=5e-3, mlp=True, **shared), tests, 0.995, seeds=2),
        Row(Options("s3", "lru", steps=800, lr=5e-3, depth=2, mlp=True, **shared), tests),
    ]


def tracking() -> list[Row]:
    """Parity, S3 and A5 with nine cells, trained up to length 128 and tested beyond it."""
    shared: dict[str, Any] = {"lengths": (8, 32, 128), "batch": 32, "mlp": True, "lr": 5e-3}
    shared["shares"] = True  # or cells that cannot would stay with the shortest
    sizes = {"parity": (64, 300), "s3": (64, 500), "a5": (128, 600)}
    rows = []
    for task, (width, steps) in sizes.items():
        tests = {str(length): (TASKS[task], length) for length in (128, 512, 2048)}
        for cell in _tracking.THEORY:
            options = Options(task, cell, width=width, steps=steps, **shared)
            rows.append(Row(options, tests))
    return rows


def latching() -> list[Row]:
    """A latch trained on up to 512 steps, tested on one stream of 1,024,000 in one scan."""
    options = Options(
        "latch",
        "minmax",
        width=32,
        lengths=(256, 512),
        batch=16,
        steps=300,
        lr=1e-2,
        threshold=0.99,
    )
    length = 1_024_000
    tests = {
        "512 steps": (TASKS["latch"], 512),
        "1,024,000 steps": (TASKS["latch"], length),
        "1,024,000 steps, a symbol in 10,000": (recall.latch(every=10_000), length),
    }
    return [Row(options, tests, batch=1, solver=prnn.AssociativeScan())]


def digits() -> list[Row]:
    """Real images of digits, one pixel per step."""
    options = Options("digits", "gru", mlp=True, lengths=(64,), batch=64, steps=800, lr=5e-3)
    return [Row(options, {"held out": (TASKS["digits"], 64)}, target=0.95, seeds=2)]


TABLES: dict[str, Callable[[], list[Row]]] = {
    "digits": digits,
    "latching": latching,
    "s3": s3,
    "synthetic": synthetic,
    "tracking": tracking,
}


# --- running --------------------------------------------------------------------------------------


def run(row: Row, folder: pathlib.Path, resume: bool) -> dict[str, Any]:
    """Trains seed after seed until one reaches the target; reports the best."""
    best: dict[str, Any] = {}
    for seed in range(row.seeds):
        options = dataclasses.replace(row.options, seed=seed)
        path = folder / f"{options.task}-{options.cell}-{seed}"
        result = run_one(row, options, path, resume)
        first = next(iter(result["accuracy"]))
        if not best or result["accuracy"][first] > best["accuracy"][first]:
            best = result
        best["seeds tried"] = seed + 1
        if result["accuracy"][first] >= row.target:
            break
    return best


def run_one(row: Row, options: Options, path: pathlib.Path, resume: bool) -> dict[str, Any]:
    """Trains and tests one model; or reads what was found, if that is of the same options."""
    done, tests = path / RESULT, list(row.tests)
    if resume and done.exists():
        found = json.loads(done.read_text())
        if found["options"] == _plain(options) and list(found["accuracy"]) == tests:
            return found
    # Where the run was stopped, later models had not begun.
    state = train(options, path, resume=resume and (path / CHECKPOINT).exists())
    log = read_metrics(path / METRICS)
    steps = np.diff([r["step"] for r in log], prepend=0)
    seconds = float(np.sum(steps / np.array([r["steps_per_second"] for r in log])))
    model: SequenceModel = state.model
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    model = model if row.solver is None else with_solver(model, row.solver)
    accuracies = {}
    for name, (task, length) in row.tests.items():
        accuracies[name] = evaluate(model, task, length, batch=row.batch)
    result = {
        "options": _plain(options),
        "accuracy": accuracies,
        "steps": state.step,
        "seconds": round(seconds, 1),
        "parameters": sum(x.size for x in arrays),
        "seeds tried": 1,
        "curve": [(r["step"], r["length"], r["accuracy"]) for r in log],
    }
    done.write_text(json.dumps(result) + "\n")
    return result


def _plain(options: Options) -> dict[str, Any]:
    """As JSON has it: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def markdown(results: list[dict[str, Any]]) -> str:
    """One line per model, accuracies in percent."""
    tests = list(results[0]["accuracy"])
    header = ["task", "cell", "trained up to", *tests, "seed", "seeds tried", "steps", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result in results:
        options = result["options"]
        reached = str(result["curve"][-1][1])
        cells = [options["task"], options["cell"], reached]
        cells += [f"{100 * result['accuracy'][test]:.2f} %" for test in tests]
        cells += [options["seed"], result["seeds tried"], result["steps"], result["seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(path: pathlib.Path, results: list[dict[str, Any]]) -> None:
    """Accuracy during training, one panel per task; if there are several tests, another panel with
    the accuracy in each."""
    tasks = list(dict.fromkeys(result["options"]["task"] for result in results))
    tests = list(results[0]["accuracy"])
    panels = len(tasks) + (len(tests) > 1)
    figure = Figure(figsize=(1.5 + 3.6 * panels, 3.6), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    cells = list(dict.fromkeys(result["options"]["cell"] for result in results))
    for result in results:
        options = result["options"]
        colour = COLOURS[cells.index(options["cell"])]
        panel = axes[tasks.index(options["task"])]
        steps, _, accuracies = zip(*result["curve"], strict=True)
        panel.plot(steps, accuracies, color=colour, label=options["cell"])
        if len(tests) > 1:
            values = list(result["accuracy"].values())
            axes[-1].plot(range(len(tests)), values, "o-", color=colour, label=options["cell"])
    for panel, task in zip(axes, tasks, strict=False):
        panel.set_title(f"{task}, during training")
        panel.set_xlabel("training step")
    if len(tests) > 1:
        axes[-1].set_title("after training")
        labels = [test.replace(", ", ",\n") for test in tests]
        axes[-1].set_xticks(range(len(tests)), labels, fontsize=8)
        axes[-1].set_xlim(-0.4, len(tests) - 0.6)
    axes[0].set_ylabel("accuracy")
    for panel in axes:
        panel.set_ylim(0, 1.04)
        panel.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(path)


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "pararnn": prnn.__version__,
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program; `args` are the words of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tables",
        description=__doc__,
        epilog="tables:\n" + "\n".join(f"  {k:<10} {v.__doc__}" for k, v in TABLES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "table", choices=list(TABLES), metavar="NAME", help="a table of those below"
    )
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("examples/results"),
        help="folder of the JSON file and the plot (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=pathlib.Path,
        default=pathlib.Path("out/tables"),
        help="folder of the checkpoints and metrics (default: %(default)s)",
    )
    flags = parser.parse_args(args)
    runs = flags.runs / flags.table
    if flags.resume and not runs.is_dir():
        raise SystemExit(
            f"error: There is nothing to resume: {runs} does not exist. Start without --resume."
        )
    flags.output.mkdir(parents=True, exist_ok=True)
    results, path = [], flags.output / f"{flags.table}.json"
    try:
        for row in TABLES[flags.table]():
            results.append(run(row, runs, flags.resume))
            print(markdown(results[-1:]), flush=True)
            path.write_text(json.dumps({"environment": environment(), "rows": results}) + "\n")
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. Go on with --resume.") from None
    print(f"\n{markdown(results)}")
    draw = _tracking.plot if flags.table == "tracking" else plot
    draw(path.with_suffix(".png"), results)
    print(f"\nWrote {path} and {path.with_suffix('.png')}.")


if __name__ == "__main__":
    main()
