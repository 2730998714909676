"""The plots of `benchmarks report`: panels with one series per solver."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from . import _gpu_tables
from ._tables import KINDS, Content

# Okabe and Ito's palette, which colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#8B4513")
MARKERS = "os^DvP<>d"

# By panel and series: `(x, y)`, or `(x, y, hollow)`.
Panels = Mapping[str, Mapping[str, Sequence[tuple[Any, ...]]]]


def plot(panels: Panels, path: pathlib.Path, title: str, x: str, y: str, columns: int = 2) -> None:
    """Draws one panel per key, with a logarithmic y axis; the first series is black.

    Where x has names, points lie side by side without lines; lengths get a logarithmic axis.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len({p[0] for s in series.values() for p in s}) for series in panels.values())
    size = max(6.6, 0.7 * most) * columns, 3.0 * rows + 0.8
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    for axes, (panel, series) in zip(grid.flat, panels.items(), strict=False):
        values = list(dict.fromkeys(p[0] for points in series.values() for p in points))
        named = isinstance(values[0], str)
        for name, points in series.items():
            i = names.index(name)
            colour = "black" if i == 0 else COLOURS[(i - 1) % len(COLOURS)]
            shift = 0.08 * (i - (len(names) - 1) / 2)
            xs = [values.index(p[0]) + shift if named else p[0] for p in points]
            marker = MARKERS[i % len(MARKERS)]
            if not named:
                axes.plot(xs, [p[1] for p in points], color=colour, lw=1.2)
            filled = [colour if len(p) < 3 or not p[2] else "none" for p in points]
            ys = [p[1] for p in points]
            axes.scatter(xs, ys, s=28, c=filled, marker=marker, edgecolors=colour)
            axes.plot([], [], marker + ("" if named else "-"), color=colour, label=name)
        if named:
            style = {} if "\n" in values[0] else {"rotation": 30, "ha": "right"}
            axes.set_xticks(range(len(values)), values, fontsize=7, **style)
        elif min(values) > 0:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(values), [f"{v:,}" for v in sorted(values)])
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set(title=panel, xlabel=x, ylabel=y)
        axes.grid(lw=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=80, metadata={"Software": None})


def draw(speed: Content, convergence: Content, counts: Content, folder: pathlib.Path) -> list[Any]:
    """Writes all plots, and returns their paths."""
    where = f"32 units, float32, {speed['environment']['device']}"
    length = "sequence length L / steps"
    hollow = "hollow: steps were finished sequentially"
    exponents = {
        r["system"]: f"{r['system']} (λ = {r['exponent']:.2f})" for r in _methods(convergence)
    }
    steps: dict[str, list[tuple[Any, ...]]] = {}
    for row in _methods(convergence):
        point = exponents[row["system"]], row["steps"], row["finished sequentially"]
        steps.setdefault(row["method"], []).append(point)
    chip = counts["environment"]["chip"]
    plots = {
        "time-cpu": (_times(speed), f"One sequence, {where}", length, "time / ms"),
        "convergence": ({"": steps}, f"Critical path ({hollow})", "", "steps"),
        "predicted-gpu": (
            _gpu_tables.panels(counts),
            f"Predicted from counts, not measured: one sequence, float32, {chip}",
            "",
            "predicted time / ms",
        ),
    }
    paths = [folder / f"{name}.png" for name in plots]
    for path, (panels, *texts) in zip(paths, plots.values(), strict=True):
        plot(panels, path, *texts)
    return paths


def _methods(convergence: Content) -> list[dict[str, Any]]:
    rows = convergence["systems"] + convergence["gains"]
    return [row for row in rows if row["method"] != "lax.scan"]


def _times(speed: Content) -> Panels:
    """Times as the ratio to the scan times one scan's time, so that all lines share a baseline."""
    panels = {}
    for cell, (kind, title) in itertools.product(("GRU", "DiagonalGRU"), KINDS.items()):
        wanted = {"cell": cell, "batch": 1, "size": 32, "project": False, "dtype": "float32"}
        scans: dict[int, float] = {}
        series: dict[str, dict[int, float]] = {}
        for record in (r for r in speed["cases"].values() if wanted.items() <= r.items()):
            for row in (row for row in record["rows"] if kind in row):
                length, found = record["length"], row[kind]
                scan = scans.setdefault(length, 1e3 * found["seconds"][0])  # the first row is it
                series.setdefault(row["name"], {}).setdefault(length, found["ratio"][0] * scan)
        panels[f"{cell}, {title}"] = {name: sorted(p.items()) for name, p in series.items()}
    return panels
