"""What was measured of the solvers, as a table and as a picture."""

import dataclasses
from typing import Any

import numpy as np

from ..solvers import AbstractSolver
from ._compare import Spread, rank
from ._table import fill, fit, number, spread_text

_KINDS = {"forward": "forward", "gradient": "forward + gradient"}
_COSTS = (
    ("compile / s", "compile_seconds", 1),
    ("temporary / MB", "temporary_bytes", 1e6),
    ("Gflop", "flops", 1e9),
    ("unfused / GB", "bytes", 1e9),
)
_LEGEND = """
    Times are medians with their quartiles (lower–upper), of runs in turns; "/ lax.scan" is the
    time over that of the scan, pair by pair: below 1 is faster. "iterations" are sweeps with a
    correction each, "steps" those made one after another. "error" is that of the states: 1 would
    be 100 % of an element's own scale, "rounding" what rounding explains. What disagrees is
    "discarded"; "finished" had to make some steps sequentially in the end. "default" is what
    `solve` chooses.
"""
_COSTS_LEGEND = """
    "temporary" is the memory beside arguments and results; "Gflop" counts operations; "unfused" is
    what would be moved if each operation read and wrote its arrays.
"""
_COLOURS = {"forward": "#0072B2", "gradient": "#D55E00"}
_MARKERS = {"forward": "o", "gradient": "s"}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What [`pararnn.benchmark`][] or [`pararnn.tune`][] measured. Printing it gives a table;
    `plot()` draws it.

    - `solver`: the fastest of the solvers that agree with the sequential run, by the time of
        forward and gradient if that was measured; [`pararnn.Sequential`][] if none agrees.
    - `baseline`: the row of the jitted `jax.lax.scan` of the step, differentiated by JAX.
    - `rows`: one dictionary per solver:
        - `solver`; `name`, its constructor call;
        - `forward`, and `gradient` if measured (forward and gradient together), each with `seconds`
            and `ratio` (time over that of the baseline, pair by pair), both with `median`, `lower`
            and `upper` quartile; `compile_seconds`, once; `temporary_bytes`, the memory that the
            compiled function takes beside its arguments and results, per device as the compiler
            says; and with `costs=True` also `flops` and `bytes`, the latter as if nothing were
            fused: an upper bound; both only of what runs on one device;
        - `iterations`, `sequential_steps` (the critical path), `chunk_size`, `fallback`, as in
            [`pararnn.Stats`][];
        - `error` and `gradient_error`, to the baseline: of the states as [`pararnn.verify`][]
            judges them, each element by its own scale (with `rounding` true, what rounding explains
            has been left out of it); of the gradient relative to the largest
            magnitude in each array. `agrees`, whether `error` is at most 1e-5 in float32 and 1e-10
            in float64, and `gradient_error`, if measured, at most a hundred times that.
    - `left_out`: the constructor calls of the solvers that were not measured, because the time was
        up or the measurement was interrupted.
    """

    solver: AbstractSolver | None
    baseline: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = sorted((self.baseline, *self.rows), key=rank)
        kinds = {kind: title for kind, title in _KINDS.items() if kind in self.baseline}
        times: list[list[list[str]]] = []
        costs: list[list[list[str]]] = []
        for kind, title in kinds.items():
            cells = [row[kind] for row in rows]
            milliseconds = [f"{title} / ms", *(_milliseconds(c["seconds"]) for c in cells)]
            ratios = ["/ lax.scan", *(spread_text(c["ratio"]) for c in cells)]
            times.append([milliseconds, ratios])
            known = [cost for cost in _COSTS if cells[0].get(cost[1]) is not None]
            columns = [
                [name, *(number(c[key] / unit) if key in c else "" for c in cells)]
                for name, key, unit in known
            ]
            if columns:
                columns[0][0] = f"{kind}: {columns[0][0]}"
                costs.append(columns)
        counts = [
            [header, *(str(row.get(key, "")) for row in rows)]
            for header, key in (("iterations", "iterations"), ("steps", "sequential_steps"))
        ]
        times.append([*counts, ["error", *map(_error, rows)]])
        if any(map(_remark, rows)):
            times[-1].append(["remark", *map(_remark, rows)])
        names = ["solver", *(row["name"] for row in rows)]
        legend = fill(_LEGEND + (_COSTS_LEGEND if costs else ""))
        tables = [fit(names, groups) for groups in (times, costs) if groups]
        lines = [*tables, legend]
        if self.left_out:
            lines.append(fill(f"Not measured, for want of time: {', '.join(self.left_out)}."))
        return "\n\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        best = min((row for row in self.rows if row["agrees"]), key=rank, default=None)
        if best is None:
            return fill("No solver that was measured agrees with lax.scan: use Sequential().")
        kind = "gradient" if "gradient" in best else "forward"
        ratio = best[kind]["ratio"].median
        return fill(
            f"Fastest that agrees: {best['name']}, {_KINDS[kind]} in {number(ratio)} of the scan's "
            f"time{'' if ratio < 1 else ': no faster than lax.scan'}."
        )

    def plot(self, path: str | None = None) -> Any:
        """Draws the times with their quartiles: dotted lines for `lax.scan`, crosses for what
        disagrees with it. Saves to `path` if given; needs and returns a figure of matplotlib."""
        try:
            import matplotlib.figure
            import matplotlib.ticker
        except ImportError as error:
            raise ImportError(
                "`plot` needs matplotlib: pip install 'pararnn[examples]' (or matplotlib alone)."
            ) from error

        rows = sorted((self.baseline, *self.rows), key=rank, reverse=True)
        kinds = [kind for kind in _KINDS if kind in self.baseline]
        figure = matplotlib.figure.Figure(
            figsize=(8, 1.2 + 0.25 * len(kinds) * len(rows)), layout="constrained"
        )
        axes = figure.subplots()
        heights = np.arange(len(rows))
        for i, kind in enumerate(kinds):
            milliseconds = 1e3 * np.array([row[kind]["seconds"] for row in rows])
            for height, row, (median, lower, upper) in zip(
                heights - 0.3 * i, rows, milliseconds, strict=True
            ):
                axes.errorbar(
                    median,
                    height,
                    xerr=[[median - lower], [upper - median]],
                    color=_COLOURS[kind],
                    fmt=_MARKERS[kind] if row["agrees"] else "x",
                    capsize=3,
                    label=_KINDS[kind] if row is self.baseline else None,
                )
            baseline = 1e3 * self.baseline[kind]["seconds"].median
            axes.axvline(baseline, color=_COLOURS[kind], ls=":", lw=1)
        axes.set_yticks(heights - 0.15 * (len(kinds) - 1), [row["name"] for row in rows])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlabel("milliseconds: median and quartiles")
        axes.grid(axis="x", lw=0.3)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _milliseconds(seconds: Spread) -> str:
    return spread_text(Spread(*(1e3 * s for s in seconds)))


def _error(row: dict[str, Any]) -> str:
    return "rounding" if row.get("rounding") else f"{row['error']:.1e}"


def _remark(row: dict[str, Any]) -> str:
    remarks = {"discarded": not row["agrees"], "finished": row.get("fallback", False)}
    return ", ".join(word for word, holds in remarks.items() if holds)
