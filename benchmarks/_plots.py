"""The pictures of `benchmarks report`."""

import pathlib
from typing import Any

import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from pararnn.diagnostics import Spread

# Okabe and Ito's palette, which colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
KINDS = {"forward": "forward", "gradient": "forward + gradient"}

Series = dict[str, list[tuple[Any, float]]]
Ratios = dict[str, list[tuple[float, float, float]]]


def _figure(rows: int, columns: int, width: float = 4.2, height: float = 3.2):
    figure = matplotlib.figure.Figure(
        figsize=(width * columns, height * rows + 0.6), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None})


def _style(i: int) -> dict[str, Any]:
    """Of the `i`-th solver; the scan comes first."""
    if i == 0:
        return {"color": "black", "marker": "x", "lw": 2}
    return {"color": COLOURS[(i - 1) % 6], "marker": MARKERS[(i - 1) % 6], "lw": 1.2}


def _length_axis(axes, lengths: set[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [f"{int(x):,}" for x in sorted(lengths)])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("sequence length L / steps")
    axes.grid(lw=0.3)


def _log_axis(axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def crossover(ratios: list[tuple[float, float, float]]) -> float | None:
    """The shortest length, interpolated between those measured, from which on a solver is faster
    than the scan by more than the spread; `None` if there is none. Each entry is a length, and the
    median and upper quartile of the ratio."""
    lengths, medians, uppers = np.log(np.array(ratios).reshape(-1, 3)).T
    if not len(lengths) or uppers[-1] >= 0:
        return None
    not_faster = np.flatnonzero(uppers >= 0)
    if not len(not_faster):
        return float(np.exp(lengths[0]))
    i = not_faster[-1]
    share = medians[i] / (medians[i] - medians[i + 1]) if medians[i] > 0 else 1.0
    return float(np.exp(lengths[i] + share * (lengths[i + 1] - lengths[i])))


def times(panels: dict[tuple[str, str], tuple[Series, Ratios]], title: str, path) -> None:
    """`panels[kind, cell]` has the milliseconds by solver, the scan's first, and the ratios."""
    kinds = [kind for kind in KINDS if any(kind == k for k, _ in panels)]
    cells = list(dict.fromkeys(cell for _, cell in panels))
    names = list(dict.fromkeys(name for seconds, _ in panels.values() for name in seconds))
    figure, grid = _figure(len(kinds), len(cells), 6.6, 2.8)
    for (kind, cell), (series, ratios) in panels.items():
        axes = grid[kinds.index(kind), cells.index(cell)]
        for name, points in series.items():
            i, label = names.index(name), name
            if i > 0:
                at, first = crossover(ratios[name]), points[0][0]
                label += ": not faster" if at is None else ": faster"
                if at is not None and at > 1.001 * first:
                    label += f" from L ≈ {at:,.0f}"
                    curve = np.log(points).T
                    y = np.exp(np.interp(np.log(at), *curve))
                    axes.plot(at, y, "*", ms=14, color=_style(i)["color"], mec="black", zorder=5)
            axes.plot(*zip(*points, strict=True), ms=5, label=label, **_style(i))
        _length_axis(axes, {length for points in series.values() for length, _ in points})
        _log_axis(axes)
        axes.set_ylabel("time / ms")
        axes.set_title(f"{cell}, {KINDS[kind]}", fontsize=10)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def heat(panels: dict[str, dict[tuple[int, int], Spread]], title: str, path: pathlib.Path) -> None:
    """`panels[name]` has speed-ups by `(length, batch × width)`. Without colour: no difference
    beyond the spread."""
    figure, grid = _figure(1, len(panels), 4.6)
    bound = max(8.0, *(max(v.median, 1 / v.median) for vs in panels.values() for v in vs.values()))
    norm = matplotlib.colors.LogNorm(1 / bound, bound)
    for axes, (name, values) in zip(grid[0], panels.items(), strict=True):
        lengths = sorted({length for length, _ in values})
        sizes = sorted({size for _, size in values})
        colours = np.full((len(sizes), len(lengths)), np.nan)
        for (length, size), speed in values.items():
            i, j = sizes.index(size), lengths.index(length)
            sure = speed.lower > 1 or speed.upper < 1
            colours[i, j] = speed.median if sure else 1.0
            dark = sure and abs(np.log(speed.median)) > 0.5 * np.log(bound)
            text = f"{speed.median:.2g}×\n({speed.lower:.2g}–{speed.upper:.2g})"
            axes.text(j, i, text, ha="center", va="center", color="w" if dark else "k", fontsize=9)
        axes.imshow(colours, norm=norm, cmap="PuOr", origin="lower", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{x:,}" for x in lengths])
        axes.set_yticks(range(len(sizes)), [f"{y:,}" for y in sizes])
        axes.set_xlabel("sequence length L / steps")
        axes.set_ylabel("batch × width")
        axes.set_title(name, fontsize=10)
    bar = figure.colorbar(grid[0, 0].images[0], ax=grid[0].tolist(), label="speed-up over lax.scan")
    bar.ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def iterations(sweep: dict[str, Any], path: pathlib.Path) -> None:
    """Iterations against the exponent of `benchmarks._gains.sweep`."""
    figure, ((axes,),) = _figure(1, 1, 7.4, 3.6)
    rows = sorted(sweep["rows"], key=lambda row: row["exponent"])
    exponents = [row["exponent"] for row in rows]
    for i, name in enumerate(rows[0]["solvers"]):
        reports = [row["solvers"][name] for row in rows]
        axes.plot(exponents, [r["iterations"] for r in reports], color=COLOURS[i], lw=1.2)
        for report, exponent in zip(reports, exponents, strict=True):
            fill = "white" if report["fallback"] else COLOURS[i]
            axes.plot(exponent, report["iterations"], MARKERS[i], color=COLOURS[i], mfc=fill)
        axes.plot([], [], MARKERS[i] + "-", color=COLOURS[i], label=name)
    axes.axvline(0, color="black", lw=0.8, ls=":")
    _log_axis(axes)
    axes.set_xlabel("largest Lyapunov exponent / nats per step (right of 0: chaotic)")
    axes.set_ylabel("iterations")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(lw=0.3)
    axes.set_title(
        f"{sweep['cell']}, {sweep['size']} units, L = {sweep['length']:,}, recurrent matrix scaled "
        "by several gains\n(open: some steps were finished sequentially)",
        fontsize=10,
    )
    _save(figure, path)


def memory(panels: dict[str, Series], title: str, path: pathlib.Path) -> None:
    """`panels[cell]` has megabytes by solver."""
    figure, grid = _figure(1, len(panels), 5.8)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    for axes, (cell, series) in zip(grid[0], panels.items(), strict=True):
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), ms=5, label=name, **_style(names.index(name)))
        _length_axis(axes, {length for points in series.values() for length, _ in points})
        _log_axis(axes)
        axes.set_ylabel("temporary memory / MB")
        axes.set_title(cell, fontsize=10)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def predictions(panels: dict[str, Series], title: str, path: pathlib.Path) -> None:
    """`panels[kind]` has predicted milliseconds by solver, the scan's first, and problem."""
    figure, grid = _figure(1, len(panels), 6.6, 3.6)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    for axes, (kind, series) in zip(grid[0], panels.items(), strict=True):
        problems = list(dict.fromkeys(at for points in series.values() for at, _ in points))
        for name, points in series.items():
            i = names.index(name)
            # Beside each other, where they have about the same time.
            places = [problems.index(at) + 0.1 * (i - (len(names) - 1) / 2) for at, _ in points]
            style = _style(i) | {"ls": "none"}
            axes.plot(places, [y for _, y in points], ms=7, label=name, **style)
        axes.set_xticks(range(len(problems)), problems, fontsize=7)
        _log_axis(axes)
        axes.set_ylabel("predicted time / ms")
        axes.grid(lw=0.3, axis="y")
        axes.set_title(kind, fontsize=10)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def scaling(panels: dict[str, dict[str, list[tuple[int, float]]]], title: str, path) -> None:
    """`panels[problem]` has predicted speed-ups by network, over the devices."""
    figure, grid = _figure(2, 2, 4.6, 3.0)
    for axes, (problem, curves) in zip(grid.flat, panels.items(), strict=True):
        for i, (name, points) in enumerate(curves.items()):
            style = {"color": COLOURS[i], "marker": MARKERS[i], "lw": 1.2}
            axes.plot(*zip(*points, strict=True), ms=4, label=name, **style)
        devices = [n for n, _ in next(iter(curves.values()))]
        axes.plot(devices, devices, color="black", ls=":", lw=1, label="as many times as devices")
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,g}")
        _log_axis(axes)
        axes.set_ylim(0.1, None)
        axes.set_xlabel("devices")
        axes.set_ylabel("speed-up, predicted")
        axes.grid(lw=0.3)
        axes.set_title(problem, fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
