"""Train every cell on the same text, with the same number of parameters, and compare.

    python -m examples.compare_cells --budget 1800

A model of each cell, as wide as the parameters allow, is trained on the same windows of the text of
`examples.char_lm`. The table has bits per character of held-out text, seconds for a step of
training, and the memory that it takes. What does not fit into the budget is done by the next call.
"""

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from matplotlib.figure import Figure

import pararnn as prnn
from pararnn.diagnostics import temporary_bytes

from ._cells import CELLS
from ._language_model import LanguageModel, make_optimiser, update
from ._options import number
from ._progress import progress_bar
from ._text import Text, all_windows, load_text, random_windows
from .char_lm import evaluate, loss_of

_WIDTHS = range(16, 1025, 4)


def parse_options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare_cells",
        description="Train every cell on the same text, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, positive = number(int, 1), number(float, 0)
    add = parser.add_argument
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="which")
    add("--parameters", type=count, default=100_000, help="of each model, about", metavar="N")
    add("--depth", type=count, default=2, help="blocks, each an RNN and an MLP", metavar="N")
    add("--length", type=count, default=256, help="of a window", metavar="CHARACTERS")
    add("--batch", type=count, default=8, help="windows in a training step", metavar="N")
    add("--steps", type=count, default=400, help="training steps", metavar="N")
    add("--lr", type=positive, default=4e-3, help="learning rate of AdamW", metavar="RATE")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is random")
    add("--budget", type=positive, default=3600.0, help="seconds for this call", metavar="S")
    add("--output", type=pathlib.Path, default=pathlib.Path("out/compare_cells"), metavar="FOLDER")
    return parser.parse_args(args)


def make_model(cell: str, text: Text, options: argparse.Namespace) -> tuple[LanguageModel, int]:
    """The model whose number of parameters is the nearest to what was asked for, and its width."""
    key = jax.random.key(options.seed)

    def make(width):
        return LanguageModel(cell, text.vocabulary, width, options.depth, key=key)

    def distance(width):
        model = eqx.filter_eval_shape(lambda: make(width))
        return abs(_count(model) - options.parameters)

    width = min(_WIDTHS, key=distance)
    return make(width), width


def _count(model: LanguageModel) -> int:
    arrays = eqx.filter(model, lambda x: isinstance(x, (jax.Array, jax.ShapeDtypeStruct)))
    return sum(x.size for x in jax.tree.leaves(arrays))


def train(cell: str, text: Text, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    model, width = make_model(cell, text, options)
    row: dict[str, Any] = {"width": width, "parameters": _count(model)}
    optimiser = make_optimiser(options.lr, options.steps)
    moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    arrays, static = eqx.partition((model, moments), eqx.is_array)

    @jax.jit
    def train_step(arrays, windows):
        model, moments = eqx.combine(arrays, static)
        loss, gradients = eqx.filter_value_and_grad(loss_of)(model, windows)
        new = update(optimiser, model, moments, gradients)
        return eqx.filter(new, eqx.is_array), loss

    rng = np.random.default_rng(options.seed)
    windows = random_windows(text.train, options.batch, options.length, rng)
    start = time.perf_counter()
    compiled = train_step.lower(arrays, windows).compile()
    row["compile_seconds"] = time.perf_counter() - start
    row["temporary_bytes"] = temporary_bytes(compiled)
    seconds, losses = [], []
    with progress_bar(cell, options.steps) as progress:
        for _ in range(options.steps):
            start = time.perf_counter()
            arrays, loss = compiled(arrays, windows)
            losses.append(float(loss))  # waits for the result
            seconds.append(time.perf_counter() - start)
            windows = random_windows(text.train, options.batch, options.length, rng)
            progress.set_postfix_str(f"{losses[-1]:.2f} bits/char", refresh=False)
            progress.update()
    model, _ = eqx.combine(arrays, static)
    held_out = all_windows(text.held_out, options.length)
    row["bits_per_character"] = evaluate(model, held_out, options.batch)
    row["seconds_per_step"] = float(np.median(seconds))
    row["loss"] = losses
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown, the best first."""
    lines = [
        "| cell | bits per character | seconds per step | parameters | width | temporary / MB |",
        "|---|---|---|---|---|---|",
    ]
    for cell, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_character"]):
        lines.append(
            f"| {cell} | {row['bits_per_character']:.3f} | {row['seconds_per_step']:.3g} | "
            f"{row['parameters']:,} | {row['width']} | {(row['temporary_bytes'] or 0) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def block(path: pathlib.Path) -> str:
    """What stands in the documentation, with what it was measured by."""
    content = json.loads(path.read_text())
    made = content["machine"]
    about = f"`python -m examples.compare_cells`, {made['device']}, JAX {made['jax']}."
    return f"{about}\n\n{table(content['rows'])}"


def plot(rows: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Bits per character over seconds per step."""
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for cell, row in rows.items():
        place = row["seconds_per_step"], row["bits_per_character"]
        axes.plot(*place, "o", color="#0072b2")
        axes.annotate(cell, place, xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds per training step")
    axes.set_ylabel("held-out text: bits per character")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program; `args` are the words of the command line."""
    begin, options = time.perf_counter(), parse_options(args)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "cells.json"
    fixed = ("parameters", "depth", "length", "batch", "steps", "lr", "seed")
    settings = {name: getattr(options, name) for name in fixed}
    machine = {
        "jax": jax.__version__,
        "pararnn": prnn.__version__,
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
    }
    found: dict[str, Any] = {"options": settings, "machine": machine, "rows": {}}
    if path.exists():
        found = json.loads(path.read_text())
        if found["options"] != settings or found["machine"] != machine:
            raise SystemExit(f"error: {path} has other options or another machine: remove it.")
    text, rows = load_text(), found["rows"]
    for cell in options.cells:
        if cell in rows:
            continue
        if time.perf_counter() - begin > options.budget:
            print(f"The budget is spent before {cell}; the same command goes on there.")
            break
        rows[cell] = train(cell, text, options)
        path.write_text(json.dumps(found, indent=1) + "\n")
    if rows:
        plot(rows, options.output / "cells.png")
        print(f"{table(rows)}\n\nWrote cells.json and cells.png to {options.output}.")


if __name__ == "__main__":
    main()
