"""The README's tables of correctness, from the files of `agreement`, `cells`, `convergence` and
`state_tracking`."""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from ._measure import markdown

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
    """The table as it is, and what became of every cell under every solver."""
    parts = [markdown(content["cells"])]
    if rows := content.get("agreement"):
        lines = []
        for (dtype, weights), part in _grouped(rows, "dtype", "weights"):
            right = [row for row in part if row["successful"]]
            line: dict[str, Any] = {"dtype": dtype, "weights": weights, "solves": len(part)}
            line["reported as failed"] = len(part) - len(right)
            line[_FINISHED] = sum(row[_FINISHED] for row in right)
            for key, goal in zip(ERRORS, GOALS[dtype], strict=True):
                line[f"largest {key}"] = _worst(right, key, goal)
            lines.append(line)
        parts.append(markdown(lines))
    return "\n\n".join(parts)


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


def state_tracking(content: dict[str, Any]) -> str:
    """The critical path of every method, in steps."""
    lines = []
    for (group, length), rows in _grouped(content["solving"], "group", "L"):
        for row in rows:
            lines.append(
                {
                    "group": group,
                    "L": f"{length:,}",
                    "solver": f"{row['solver']}, chunks of {row['chunk']}",
                    "iterations": row["iterations"],
                    "steps": f"{row['steps']:,}",
                    _FINISHED: "yes" if row[_FINISHED] else "no",
                    "error": f"{row['error']:.1e}",
                }
            )
    return markdown(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "agreement": agreement,
    "cells": cells,
    "convergence": convergence,
    "state_tracking": state_tracking,
}


def tables(folder: pathlib.Path) -> dict[str, str]:
    """What stands between the markers of each name, with the machine that it was measured on."""
    found = {}
    for name, table in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            made = content["environment"]
            about = f"`python -m benchmarks {name}`, {made['device']}, JAX {made['jax']}"
            found[name] = f"{about}, {made['date']}.\n\n{table(content)}"
    return found
