"""The tables of correctness, from the files of `agreement`, `cells`, `convergence`,
`random_systems`, `state_tracking` and `trained`."""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from ._measure import markdown
from .random_systems import table as systems_table

Rows = list[dict[str, Any]]
# The largest relative errors of values and gradients that agree.
GOALS = {"float32": (1e-5, 1e-4), "float64": (1e-10, 1e-8)}
ERRORS = "value error", "gradient error"
_FINISHED = "finished sequentially"


def _grouped(rows: Rows, *keys: str) -> Iterable[tuple[tuple[Any, ...], Rows]]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def _worst(rows: Rows, key: str, goal: float) -> str:
    """The largest; in bold if it is beyond the goal."""
    worst = max(row[key] for row in rows)
    return f"**{worst:.1e}**" if worst > goal else f"{worst:.1e}"


def agreement(content: dict[str, Any]) -> str:
    """The worst over cells and lengths."""
    lines = []
    for (dtype, solver), rows in _grouped(content["errors"], "dtype", "solver"):
        line: dict[str, Any] = {"dtype": dtype, "solver": solver}
        for key, goal in zip(ERRORS, GOALS[dtype], strict=True):
            line[f"{key} (goal)"] = f"{_worst(rows, key, goal)} ({goal:.0e})"
        line["iterations"] = _range(rows, "iterations")
        lines.append(line)
    return markdown(lines)


def _range(rows: Rows, key: str) -> str:
    values = [row[key] for row in rows]
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def cells(content: dict[str, Any]) -> str:
    """Structure and iterations, as they are."""
    return markdown(content["cells"])


def cells_agreement(content: dict[str, Any]) -> str:
    """What became of every cell under every solver."""
    lines = []
    for (dtype, weights), rows in _grouped(content["agreement"], "dtype", "weights"):
        right = [row for row in rows if row["successful"]]
        line: dict[str, Any] = {"dtype": dtype, "weights": weights, "solves": len(rows)}
        line["reported as failed"] = len(rows) - len(right)
        line[_FINISHED] = sum(row[_FINISHED] for row in right)
        for key, goal in zip(ERRORS, GOALS[dtype], strict=True):
            line[f"largest {key}"] = _worst(right, key, goal)
        lines.append(line)
    (stream,) = content["MinMax over a long stream"]
    return (
        f"{markdown(lines)}\n\nMinMax over {stream['L']:,} steps in one associative scan: relative "
        f"error of values {stream['value error']:.1e}, of gradients "
        f"{stream['gradient error']:.1e}; largest state {stream['largest state']:.3g}."
    )


def convergence(content: dict[str, Any]) -> str:
    """Iterations by system and method; in brackets where chunks were finished sequentially."""
    rows = content["systems"] + content.get("gains", [])
    lines = []
    methods = list(dict.fromkeys(row["method"] for row in rows if row["iterations"] != ""))
    for (system, exponent), part in _grouped(rows, "system", "exponent"):
        found = {row["method"]: row for row in part}
        line: dict[str, Any] = {"system": system, "exponent": f"{exponent:.2f}"}
        for method in methods:
            row = found.get(method)
            count = "" if row is None else row["iterations"]
            line[method] = f"({count})" if row is not None and row[_FINISHED] else count
        chosen = part[-1]
        line["its chunk, steps"] = f"{chosen['chunk']}, {chosen['steps']:,}"
        lines.append(line)
    return markdown(lines)


def random_systems(content: dict[str, Any]) -> str:
    """Verdicts by family, and each system that was silently wrong."""
    parts = [markdown(systems_table(content))]
    if content["silent"]:
        parts.append(markdown(content["silent"]))
    return "\n\n".join(parts)


def solvers(content: dict[str, Any]) -> str:
    """Adaptive damping against constants; time to compile."""
    adaptive, *constants = content["damping"]
    finished = [row for row in constants if not row[_FINISHED]]
    best = min(finished, key=lambda row: row["iterations"])
    parts = [
        f"Levenberg–Marquardt on a GRU of gain 3 (8 units, L = 512): {adaptive['iterations']} "
        f"iterations with adaptive damping; {best['iterations']} with the best constant, "
        f"μ = {best['damping']:g}.",
        "Compile time of the forward pass at L = 16,384, relative to the scan's:",
        markdown(content["compile"]),
    ]
    return "\n\n".join(parts)


def state_tracking(content: dict[str, Any]) -> str:
    """The critical path of every method, in steps."""
    lines = [
        {
            "group": row["group"],
            "L": f"{row['L']:,}",
            "solver": f"{row['solver']}, chunks of {row['chunk']}",
            "iterations": row["iterations"],
            "steps": f"{row['steps']:,}",
            _FINISHED: "yes" if row[_FINISHED] else "no",
            "error": f"{row['error']:.1e}",
        }
        for row in content["solving"]
    ]
    return markdown(lines)


def trained(content: dict[str, Any]) -> str:
    """Iterations, critical path and error of each network and method; how long they remember."""
    lines = [
        {
            "network": row["network"],
            "L": f"{row['L']:,}",
            "solver": f"{row['method']}, chunks of {row['chunk']}",
            "iterations": row["iterations"],
            "steps": f"{row['steps']:,}",
            _FINISHED: "yes" if row[_FINISHED] else "no",
            "error": f"{row['error']:.1e}",
            "of the scan": f"{row['error of the scan']:.1e}",
        }
        for row in content["short"] + content.get("long", [])
    ]
    memory = [
        f"{name} {min(steps):,} to {max(steps):,}" for name, steps in content["memory"].items()
    ]
    about = "Steps until a ten-thousandth of a disturbance is left, at six times: "
    return f"{markdown(lines)}\n\n{about}{', '.join(memory)}."


# By name: the file, and what makes a table of it.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "agreement": ("agreement", agreement),
    "cells": ("cells", cells),
    "cells-agreement": ("cells", cells_agreement),
    "convergence": ("convergence", convergence),
    "solvers": ("convergence", solvers),
    "random-systems": ("random_systems", random_systems),
    "state-tracking": ("state_tracking", state_tracking),
    "trained": ("trained", trained),
}


def tables(folder: pathlib.Path) -> dict[str, str]:
    """What stands between the markers of each name, with the machine that it was measured on."""
    found = {}
    for name, (file, table) in TABLES.items():
        content = json.loads((folder / f"{file}.json").read_text())
        made = content["environment"]
        about = f"`python -m benchmarks {file}`, {made['device']}, JAX {made['jax']}"
        found[name] = f"{about}, {made['date']}.\n\n{table(content)}"
    return found
