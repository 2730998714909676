"""The result of a benchmark, as a table and as a plot."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..solvers import AbstractSolver
from ._compare import Spread
from ._rows import Measurement, Row
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
    be 100 % of an element's own scale, "rounding" one that rounding explains. Remarks: "discarded"
    disagrees with lax.scan, "finished" made some steps sequentially. "default" is the choice of
    `solve`.
    "temporary" is the memory beside arguments and results; "Gflop" counts operations; "unfused"
    counts the bytes moved if each operation read and wrote its arrays.
"""
_COLOURS = {"forward": "#0072B2", "gradient": "#D55E00"}
_MARKERS = {"forward": "o", "gradient": "s"}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The result of [`pararnn.benchmark`][] or [`pararnn.tune`][]. Printing it gives a table;
    `plot()` draws it.

    - `solver`: the fastest of the solvers that agree with the sequential run, by the time of
        forward and gradient if measured; [`pararnn.Sequential`][] if none agrees.
    - `baseline`: the row of the jitted `jax.lax.scan` of the step, differentiated by JAX.
    - `rows`: one per solver.
    - `left_out`: the constructor calls of the solvers that were not measured because the budget was
        spent or the measurement was interrupted.
    """

    solver: AbstractSolver | None
    baseline: Row
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = self._ranked()
        times: list[list[list[str]]] = []
        costs: list[list[list[str]]] = []
        for kind, measured in self._kinds(rows).items():
            milliseconds = [f"{_KINDS[kind]} / ms", *(_milliseconds(m.seconds) for m in measured)]
            times.append([milliseconds, ["/ lax.scan", *(spread_text(m.ratio) for m in measured)]])
            columns = [
                [header, *("" if x is None else number(x / unit) for x in values)]
                for header, field, unit in _COSTS
                if (values := [getattr(m, field) for m in measured])[0] is not None
            ]
            columns[0][0] = f"{kind}: {columns[0][0]}"
            costs.append(columns)
        counts = [
            [header, *("" if x is None else str(x) for x in values)]
            for header, values in (
                ("iterations", [row.iterations for row in rows]),
                ("steps", [row.sequential_steps for row in rows]),
            )
        ]
        errors = ["rounding" if row.rounding else f"{row.error:.1e}" for row in rows]
        times.append([*counts, ["error", *errors]])
        if any(map(_remark, rows)):
            times[-1].append(["remark", *map(_remark, rows)])
        names = ["solver", *(row.name for row in rows)]
        lines = [fit(names, times), fit(names, costs), fill(_LEGEND)]
        if self.left_out:
            lines.append(fill(f"Not measured, for want of time: {', '.join(self.left_out)}."))
        return "\n\n".join([*lines, self._verdict()])

    def _ranked(self) -> list[Row]:
        return sorted((self.baseline, *self.rows), key=lambda row: row.slowest.seconds.median)

    def _kinds(self, rows: Sequence[Row]) -> dict[str, list[Measurement]]:
        kinds = _KINDS if self.baseline.gradient is not None else ("forward",)
        return {kind: [getattr(row, kind) for row in rows] for kind in kinds}

    def _verdict(self) -> str:
        best = next(
            (row for row in self._ranked() if row.agrees and row is not self.baseline), None
        )
        if best is None:
            return fill("No solver that was measured agrees with lax.scan: use Sequential().")
        kind, ratio = "forward" if best.gradient is None else "gradient", best.slowest.ratio.median
        return fill(
            f"Fastest that agrees: {best.name}, {_KINDS[kind]} in {number(ratio)} of the scan's "
            f"time{'' if ratio < 1 else ': no faster than lax.scan'}."
        )

    def plot(self, path: str | None = None) -> Any:
        """Draws the times with their quartiles: dotted lines for `lax.scan`, crosses for solvers
        that disagree with it. Saves to `path` if given; returns a figure of matplotlib, which must
        be installed."""
        try:
            import matplotlib.figure
            import matplotlib.ticker
        except ImportError as error:
            raise ImportError(
                "`plot` needs matplotlib: pip install 'pararnn[examples]' (or matplotlib alone)."
            ) from error

        rows = self._ranked()[::-1]
        kinds = self._kinds(rows)
        figure = matplotlib.figure.Figure(
            figsize=(8, 1.2 + 0.25 * len(kinds) * len(rows)), layout="constrained"
        )
        axes = figure.subplots()
        heights = np.arange(len(rows))
        for i, (kind, measured) in enumerate(kinds.items()):
            milliseconds = 1e3 * np.array([m.seconds for m in measured])
            for height, row, (median, lower, upper) in zip(
                heights - 0.3 * i, rows, milliseconds, strict=True
            ):
                axes.errorbar(
                    median,
                    height,
                    xerr=[[median - lower], [upper - median]],
                    color=_COLOURS[kind],
                    fmt=_MARKERS[kind] if row.agrees else "x",
                    capsize=3,
                    label=_KINDS[kind] if row is self.baseline else None,
                )
            axes.axvline(
                1e3 * getattr(self.baseline, kind).seconds.median,
                color=_COLOURS[kind],
                ls=":",
                lw=1,
            )
        axes.set_yticks(heights - 0.15 * (len(kinds) - 1), [row.name for row in rows])
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


def _remark(row: Row) -> str:
    remarks = {"discarded": not row.agrees, "finished": row.fallback}
    return ", ".join(word for word, holds in remarks.items() if holds)
