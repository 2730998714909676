"""What do the solvers cost on this machine, and which is fastest?"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._compare import Spread, compare, scan_states
from ._detection import detect_structure
from ._misc import agreement_tolerance, num_steps, raveler, time_slice
from ._solve import solve
from .solvers import AbstractSolver, Jacobi, Newton, QuasiNewton, Sequential

_Step = Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]]
_KINDS = {"forward": "forward", "gradient": "forward + gradient"}
_COSTS = (
    ("compile / s", "compile_seconds", 1),
    ("temporary / MB", "temporary_bytes", 1e6),
    ("Gflop", "flops", 1e9),
    ("unfused / GB", "bytes", 1e9),
)
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
            compiled function takes beside its arguments and results; and with `costs=True` also
            `flops` and `bytes`, the latter as if nothing were fused: an upper bound;
        - `iterations`, `sequential_steps` (the critical path), `chunk_size`, `fallback`, as in
            [`pararnn.Stats`][];
        - `error` and `gradient_error`, relative to the baseline; `agrees`, whether `error` is at
            most 1e-5 in float32 and 1e-10 in float64.
    """

    solver: AbstractSolver | None
    baseline: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        rows = sorted((self.baseline, *self.rows), key=_rank)
        times: list[list[str]] = []
        costs: list[list[str]] = []
        for kind, title in _KINDS.items():
            if kind not in self.baseline:
                continue
            cells = [row[kind] for row in rows]
            times.append([f"{title} / ms", *(_milliseconds(c["seconds"]) for c in cells)])
            times.append(["/ lax.scan", *(str(c["ratio"]) for c in cells)])
            for header, key, unit in _COSTS:
                if cells[0].get(key) is not None:
                    costs.append([f"{kind}: {header}", *(f"{c[key] / unit:.3g}" for c in cells)])
        for header, key in (("iterations", "iterations"), ("steps", "sequential_steps")):
            times.append([header, *(str(row.get(key, "")) for row in rows)])
        times.append(["error", *(f"{row['error']:.1e}" for row in rows)])
        names = ["solver", *(row["name"] + _remark(row) for row in rows)]
        return "\n\n".join(_table([names, *columns]) for columns in (times, costs))

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

        rows = sorted((self.baseline, *self.rows), key=_rank, reverse=True)
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


def _rank(row: dict[str, Any]) -> float:
    return row.get("gradient", row["forward"])["seconds"].median


def _milliseconds(seconds: Spread) -> str:
    return str(Spread(*(1e3 * s for s in seconds)))


def _remark(row: dict[str, Any]) -> str:
    remark = "" if row["agrees"] else "  (discarded: disagrees)"
    return remark + ("  (finished sequentially)" if row.get("fallback") else "")


def _table(columns: list[list[str]]) -> str:
    """Columns with their headers, all but the first aligned to the right."""
    names, *numbers = columns
    width = max(map(len, names))
    lines = [name.ljust(width) for name in names]
    for column in numbers:
        width = max(map(len, column))
        lines = [f"{a}  {b.rjust(width)}" for a, b in zip(lines, column, strict=True)]
    return "\n".join(lines)


def _describe(solver: AbstractSolver | None) -> str:
    """The solver's constructor call with the arguments that are not at their defaults."""
    if solver is None:
        return "default"
    changed = [
        f"{f.name}={getattr(solver, f.name)!r}"
        for f in dataclasses.fields(solver)  # pyright: ignore[reportArgumentType]
        if getattr(solver, f.name) != f.default
    ]
    return f"{type(solver).__name__}({', '.join(changed)})"


def benchmark(
    step: _Step,
    xs: PyTree[Any],
    init: PyTree[Any],
    *,
    solvers: Sequence[AbstractSolver | None] | None = None,
    gradient: bool = True,
    repetitions: int = 7,
    costs: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures solvers on this machine against the jitted `jax.lax.scan` of a step.

    Time (in turns: A B A B …), compile time, memory, operations and bytes, iterations, critical
    path, and the error against the sequential run. Runs outside of `jit`, on concrete arrays.

    **Arguments:**

    - `step`, `xs`, `init`: as for [`pararnn.solve`][], with at least one step.
    - `solvers`: what to measure; `None` in it is what `solve` chooses. `None` instead of it is the
        choice of `solve` and the usual solvers with several chunk sizes.
    - `gradient`: whether to measure forward and gradient too, with the solver as `adjoint`: a
        quadratic loss of the states and its derivative with respect to `xs`, `init` and the arrays
        in `step`, if it is an Equinox module or a method of one, against JAX's own derivative of
        the scan.
    - `repetitions`: how often each is timed.
    - `costs`: whether to count operations and bytes, which takes about as long as compiling.
    - `progress`: whether to show a progress bar.

    **Returns:**

    A [`pararnn.Benchmark`][].

    **Raises:**

    `ValueError` or `TypeError` naming the argument, as [`pararnn.solve`][] does.
    """
    return _benchmark(step, xs, init, solvers, gradient, repetitions, costs, progress, "benchmark")


def tune(
    step: _Step,
    xs: PyTree[Any],
    init: PyTree[Any],
    *,
    solvers: Sequence[AbstractSolver] | None = None,
    gradient: bool = False,
    repetitions: int = 7,
    progress: bool = True,
) -> Benchmark:
    """Measures solvers on this machine, to find the fastest that agrees with the sequential run: a
    quick [`pararnn.benchmark`][].

    **Arguments:**

    - `step`, `xs`, `init`, `gradient`, `repetitions`, `progress`: as for [`pararnn.benchmark`][].
    - `solvers`: the candidates; `None` tries the usual ones with several chunk sizes. `Sequential`
        is always among them.

    **Returns:**

    A [`pararnn.Benchmark`][], whose `solver` is the fastest.
    """
    if solvers is not None:
        solvers = [Sequential(), *(s for s in solvers if not isinstance(s, Sequential))]
    return _benchmark(step, xs, init, solvers, gradient, repetitions, False, progress, "tune")


def _benchmark(step, xs, init, solvers, gradient, repetitions, costs, progress, title) -> Benchmark:
    xs, init = jtu.tree_map(jnp.asarray, (xs, init))
    if num_steps(xs) == 0:
        raise ValueError("`xs` must have at least one step to measure anything; got 0.")
    if isinstance(repetitions, bool) or not isinstance(repetitions, int) or repetitions < 1:
        raise ValueError(f"`repetitions` must be a positive Python int; got {repetitions!r}.")
    for solver in solvers or ():
        if solver is not None and not isinstance(solver, AbstractSolver):
            raise TypeError(f"`solvers` must be solver instances or None; got {solver!r}.")
    if solvers is None:
        solvers = [None] if costs else []
        solvers += [Sequential(), *_usual_solvers(step, xs, init)]
    runs: dict[str, Any] = {"lax.scan": lambda *args: (scan_states(*args), None)}
    for solver in solvers:
        runs[_describe(solver)] = _run(solver)
    baseline, *rows = compare(
        runs,
        (step, xs, init),
        gradient=gradient,
        repetitions=repetitions,
        costs=costs,
        title=title if progress else None,
    )
    tolerance = agreement_tolerance(raveler(init)[3])
    named = {_describe(solver): solver for solver in solvers}
    for row in (baseline, *rows):
        row["agrees"] = row["error"] <= tolerance
    rows = [{"solver": named[row["name"]], **row} for row in rows]
    best = min((row for row in rows if row["agrees"]), key=_rank, default=None)
    return Benchmark(Sequential() if best is None else best["solver"], baseline, tuple(rows))


def _run(solver: AbstractSolver | None):
    def run(step, xs, init):
        solution = solve(step, xs, init, solver=solver, adjoint=solver, throw=False)
        return solution.states, solution.stats

    return run


def _usual_solvers(step, xs, init) -> list[AbstractSolver]:
    length = num_steps(xs)
    structure = detect_structure(step, init, time_slice(xs))
    _, _, size, _ = raveler(init)
    solvers: list[AbstractSolver] = [Jacobi(chunk_size=c) for c in (16, 64, 256) if c < length]
    if structure.num_seeds(size) <= 4:
        solvers += [Newton(chunk_size=c) for c in (1, 16) if c < length]
    else:
        solvers += [Newton(chunk_size=c) for c in (16, 64, 256) if c < length]
        solvers += [QuasiNewton(chunk_size=64)] if length > 64 else []
    return solvers
