"""`python -m examples.tasks NAME [options]`: trains on a task, and tests at other lengths."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

from .._cells import CELLS
from .._model import SOLVERS
from .._options import number
from . import TASKS
from ._train import Options, evaluate, train


def parse_options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tasks",
        description="Train a sequence model on a task, and test it at other lengths. Ctrl-C leaves "
        "a checkpoint from which --resume goes on as if nothing had happened.",
        epilog="tasks:\n" + "\n".join(f"  {k:<11} {v.description}" for k, v in TASKS.items()),
        formatter_class=_Help,
    )
    count, maybe_zero, positive = number(int, 1), number(int, 0), number(float, 0)
    add = parser.add_argument
    add("task", choices=list(TASKS), metavar="NAME", help="a task of those below")
    add("--cell", default="gru", help="the recurrence", choices=list(CELLS))
    add("--solver", default="auto", help="how it is evaluated", choices=list(SOLVERS))
    add("--width", default=64, help="features of a step", type=count, metavar="N")
    add("--depth", default=1, help="blocks", type=count, metavar="N")
    add("--conv", default=0, help="width of a causal convolution", type=maybe_zero, metavar="N")
    add("--mlp", action="store_true", help="end each block with an MLP")
    add(
        "--length",
        default=[64],
        help="lengths to train at, one after the other",
        type=count,
        nargs="+",
        metavar="STEPS",
    )
    add("--eval-lengths", default=[], help="lengths to test at", type=count, nargs="+", metavar="N")
    add("--threshold", default=0.95, help="accuracy at which to go on", type=positive, metavar="P")
    add(
        "--batch",
        default=64,
        help="sequences in a step at the last length",
        type=count,
        metavar="N",
    )
    add("--steps", default=1000, help="training steps", type=count, metavar="N")
    add("--lr", default=3e-3, help="learning rate after warm-up", type=positive, metavar="RATE")
    add("--seed", default=0, help="of weights and sequences", type=maybe_zero, metavar="N")
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in the output folder; --steps may be another",
    )
    add(
        "--output",
        default=None,
        help="folder for the results; None: out/tasks/NAME",
        type=pathlib.Path,
        metavar="FOLDER",
    )
    options = parser.parse_args(args)
    only = TASKS[options.task].length
    if only is not None and {*options.length, *options.eval_lengths} - {only}:
        parser.error(f"argument --length: must be {only} for {options.task}")
    if options.output is None:
        options.output = pathlib.Path("out/tasks") / options.task
    return options


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the list of tasks as it is."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program; `args` are the words of the command line."""
    flags = parse_options(args)
    names = [field.name for field in dataclasses.fields(Options)]
    given = {name: value for name, value in vars(flags).items() if name in names}
    options = Options(**given, lengths=tuple(flags.length))
    task = TASKS[options.task]
    print(f"{options.task}: {task.description}.", flush=True)
    try:
        state = train(options, flags.output, resume=flags.resume)
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped. Go on with --resume; all is in {flags.output}.") from None
    except (FloatingPointError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    accuracies = {}
    for length in sorted({options.lengths[-1], *flags.eval_lengths}):
        accuracies[length] = evaluate(state.model, task, length, seed=options.seed + 1_000_000)
        print(f"accuracy at length {length}: {accuracies[length]:.4f}")
    result = {"options": dataclasses.asdict(options), "accuracy": accuracies}
    (flags.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote checkpoint.eqx, metrics.jsonl, metrics.png and result.json to {flags.output}.")


if __name__ == "__main__":
    main()
