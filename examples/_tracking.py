"""Who can follow the state of a machine: what theory says, and the table and the plot of what was
measured (`python -m examples.tables tracking`)."""

import json
import pathlib
from typing import Any

from matplotlib.figure import Figure

# Whether one layer can do a task at any length, in finite precision.
#
# - With transitions of positive real eigenvalues only, or ones that do not depend on the input, no
#   layer can do parity; with real eigenvalues only, none can count modulo 3, as S3 and A5 need
#   (Grazzi et al., *Unlocking state-tracking in linear RNNs through negative eigenvalues*, 2024).
# - Two reflections make a rotation of a plane. S3 is among the reflections and rotations of a
#   plane, A5 among the rotations of space, so two per step are enough (Siems et al., *DeltaProduct:
#   improving state-tracking in linear RNNs via Householder products*, 2025).
# - The word problem of A5 is NC1-complete: no diagonal linear recurrence is known to do it, and
#   none does if TC0 is not NC1 (Merrill et al., *The illusion of state in state-space models*,
#   2024).
# - A nonlinear recurrence can be any finite automaton.
_NONE, _ALL = (False, False, False), (True, True, True)
TASKS = {"parity": 2, "s3": 6, "a5": 60}  # and the number of classes
THEORY = {
    "lru": _NONE,
    "mamba": _NONE,
    "gla": _NONE,
    "deltanet": _NONE,
    "deltanet-negative": (True, False, False),
    "deltaproduct": _ALL,
    "gru": _ALL,
    "m2rnn": _ALL,
    "lstm": _ALL,
}
_COLOURS = dict(
    zip(
        THEORY,
        "#999999 #cc79a7 #f0e442 #e69f00 #d55e00 #000000 #0072b2 #009e73 #56b4e9".split(),
        strict=True,
    )
)


def can(cell: str, task: str) -> bool:
    """What theory says."""
    return THEORY[cell][list(TASKS).index(task)]


def _found(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["options"]["cell"], row["options"]["task"]): row for row in rows}


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, one line per cell: for each task what theory says, and the accuracies."""
    found, lengths = _found(rows), list(rows[0]["accuracy"])
    header = ["cell"]
    for task in TASKS:
        name = task if task == "parity" else task.upper()
        header += [f"{name}: theory", *(f"at {int(n):,}" for n in lengths)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for cell in THEORY:
        columns = [cell]
        for task in TASKS:
            columns.append("yes" if can(cell, task) else "no")
            row = found.get((cell, task))
            shown = [f"{100 * row['accuracy'][n]:.1f} %" for n in lengths] if row else []
            columns += shown or ["–"] * len(lengths)
        lines.append("| " + " | ".join(columns) + " |")
    chance = ["chance"]
    for classes in TASKS.values():
        chance += ["", *[f"{100 / classes:.1f} %"] * len(lengths)]
    return "\n".join([*lines, "| " + " | ".join(chance) + " |"])


def block(path: pathlib.Path) -> str:
    """What stands in the documentation, from the JSON file."""
    content = json.loads(path.read_text())
    made = content["environment"]
    about = f"`python -m examples.tables tracking`, {made['device']}, JAX {made['jax']}."
    return f"{about}\n\n{table(content['rows'])}"


def plot(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over length, one panel per task; dashed where theory says that a cell cannot."""
    found, marks = _found(rows), [int(n) for n in rows[0]["accuracy"]]
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for panel, (task, classes) in zip(panels, TASKS.items(), strict=True):
        for cell, colour in _COLOURS.items():
            row = found.get((cell, task))
            if row is None:
                continue
            lengths = [int(n) for n in row["accuracy"]]
            style = "o-" if can(cell, task) else "o--"
            values = list(row["accuracy"].values())
            panel.plot(lengths, values, style, color=colour, label=cell, markersize=4)
        panel.axhline(1 / classes, color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(marks, [f"{n:,}" for n in marks])
        panel.set_title(f"{task} (dotted: chance)", fontsize=10)
        panel.set_xlabel("length of the test")
        panel.set_ylim(0, 1.04)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        title = "dashed: theory\nsays no"
        figure.legend(handles, labels, loc="outside right center", fontsize=8, title=title)
    figure.savefig(path)
