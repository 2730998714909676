"""What do the solvers cost on this machine, and which is fastest?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._line import AxisName
from .._misc import num_steps, raveler, time_slice
from .._norms import agreement_tolerance
from .._recurrence import scan_states
from ..solvers import (
    AbstractSolver,
    AssociativeScan,
    Jacobi,
    Newton,
    QuasiNewton,
    Sequential,
    TimeSharded,
)
from ..structures import detect_structure, is_affine
from ._agreement import Agreement
from ._compare import Spread, compare
from ._places import Places, axis_of, find_places
from ._problem import AnyRecurrence, Problem, check_batch_size, make_problem
from ._table import fill, fit, number, spread_text

# Gradients of weights are sums over all steps, of which the scan's own rounding leaves less.
_GRADIENT_FACTOR = 100
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
    """

    solver: AbstractSolver | None
    baseline: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        rows = sorted((self.baseline, *self.rows), key=_rank)
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
        return "\n\n".join([*tables, legend, self._verdict()])

    def _verdict(self) -> str:
        best = min((row for row in self.rows if row["agrees"]), key=_rank, default=None)
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
    return spread_text(Spread(*(1e3 * s for s in seconds)))


def _error(row: dict[str, Any]) -> str:
    return "rounding" if row.get("rounding") else f"{row['error']:.1e}"


def _remark(row: dict[str, Any]) -> str:
    remarks = {"discarded": not row["agrees"], "finished": row.get("fallback", False)}
    return ", ".join(word for word, holds in remarks.items() if holds)


def _describe(solver: AbstractSolver | None) -> str:
    """The solver's constructor call with the arguments that are not at their defaults."""
    if solver is None:
        return "default"
    changed = [
        (f.name, getattr(solver, f.name))
        for f in dataclasses.fields(solver)  # pyright: ignore[reportArgumentType]
        if getattr(solver, f.name) != f.default
    ]
    texts = (
        f"{name}={_describe(value) if isinstance(value, AbstractSolver) else repr(value)}"
        for name, value in changed
    )
    return f"{type(solver).__name__}({', '.join(texts)})"


def benchmark(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    solvers: Sequence[AbstractSolver | None] | None = None,
    batch_size: int | None = None,
    gradient: bool = True,
    repetitions: int = 7,
    costs: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures solvers on this machine against the jitted `jax.lax.scan` of a recurrence.

    Time (in turns: A B A B …), compile time, memory, operations and bytes, iterations, critical
    path, and the error against the sequential run. Runs outside of `jit`, on concrete arrays.

    What cuts time along an axis of a mesh (a [`pararnn.TimeSharded`][] among the `solvers`, or that
    of the layer) runs on that mesh, which is the one that is set or that of `xs`, with the inputs
    placed there beforehand; all else, the scan too, runs on one device, the first of the mesh.

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][]. What is
        measured is the recurrence, without `project` and `readout`, from which nothing is gained.
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and the state to start from, which may be left out. At least one step.
    - `solvers`: what to measure; `None` in it is what `solve` chooses. `None` instead of it is the
        layer's solver or the choice of `solve`, and the usual solvers with several chunk sizes; and
        if `xs` is sharded along time, `TimeSharded` by itself and with `Newton()`.
    - `batch_size`: measures `jax.vmap` over so many sequences: `xs`, which is one sequence here
        too, and `xs` rolled along time by further and further. `None` measures `xs` without `vmap`.
    - `gradient`: whether to measure forward and gradient too, with the solver as `adjoint` (or the
        layer's): a quadratic loss of the states and its derivative with respect to `xs`, `init` and
        the weights of a cell or the arrays in a step that is an Equinox module or a method of one,
        against JAX's own derivative of the scan.
    - `repetitions`: how often each is timed.
    - `costs`: whether to count operations and bytes, which takes about as long as compiling.
    - `progress`: whether to show a progress bar.

    **Returns:**

    A [`pararnn.Benchmark`][].

    **Raises:**

    `ValueError` or `TypeError` naming the argument, as [`pararnn.solve`][] does.
    """
    options = (solvers, batch_size, gradient, repetitions, costs, progress)
    return _benchmark(recurrence, xs, init, *options, title="benchmark")


def tune(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    solvers: Sequence[AbstractSolver] | None = None,
    batch_size: int | None = None,
    gradient: bool = False,
    repetitions: int = 7,
    progress: bool = True,
) -> Benchmark:
    """Measures solvers on this machine, to find the fastest that agrees with the sequential run: a
    quick [`pararnn.benchmark`][].

    **Arguments:**

    - `recurrence`, `xs`, `init`, `batch_size`, `gradient`, `repetitions`, `progress`: as for
        [`pararnn.benchmark`][].
    - `solvers`: the candidates; `None` tries the usual ones with several chunk sizes, and the
        layer's. `Sequential` is always among them.

    **Returns:**

    A [`pararnn.Benchmark`][], whose `solver` is the fastest.
    """
    if solvers is not None:
        solvers = [Sequential(), *(s for s in solvers if s != Sequential())]
    options = (solvers, batch_size, gradient, repetitions, False, progress)
    return _benchmark(recurrence, xs, init, *options, title="tune")


def _benchmark(
    recurrence, xs, init, solvers, batch_size, gradient, repetitions, costs, progress, title
) -> Benchmark:
    check_batch_size(batch_size)
    if isinstance(repetitions, bool) or not isinstance(repetitions, int) or repetitions < 1:
        raise ValueError(f"`repetitions` must be a positive Python int; got {repetitions!r}.")
    for solver in solvers or ():
        if solver is not None and not isinstance(solver, AbstractSolver):
            raise TypeError(f"`solvers` must be solver instances or None; got {solver!r}.")
    places = find_places(recurrence, xs, init, solvers or ())
    with places.one_device():
        one = make_problem(*places.on_one((recurrence, xs, init)))
        if num_steps(one.us) == 0:
            raise ValueError("`xs` must have at least one step to measure anything; got 0.")
        if solvers is None:
            solvers = [one.solver] if costs or one.solver is not None else []
            solvers += [Sequential(), *_usual_solvers(one), *_solvers_along(places.lies)]
        options = (gradient, repetitions, costs, title if progress else None)
        return _measured(one, places, solvers, batch_size, *options)


def _measured(
    one: Problem, places: Places, solvers, batch_size, gradient, repetitions, costs, title
) -> Benchmark:
    problem = one if batch_size is None else one.batched(batch_size)

    def scan(step, us, init):
        return scan_states(step if batch_size is None else jax.vmap(step), us, init), None

    args = (one.step, problem.us, problem.init)
    runs: dict[str, Any] = {"lax.scan": scan}
    elsewhere: dict[str, Any] = {}
    for solver in solvers:
        name, run = _describe(solver), _run(one, solver)
        runs[name] = run if batch_size is None else _over_batch(run)
        axis = axis_of(solver, one.adjoint)
        if axis is not None:
            elsewhere[name] = places.along(axis, args)
    known: list[Agreement] = []
    differences: list[float] = []  # of each run, in their order

    def judge(states, expected):
        if not known:
            known.append(Agreement(problem.step, problem.us, problem.init, expected))
        error = known[0].value_error(states)
        differences.append(known[0].value_difference)
        return error

    baseline, *rows = compare(
        runs,
        args,
        gradient=gradient,
        repetitions=repetitions,
        costs=costs,
        title=title,
        judge=judge,
        elsewhere=elsewhere,
    )
    tolerance = agreement_tolerance(raveler(problem.init)[3])
    named = {_describe(solver): solver for solver in solvers}
    for row, difference in zip((baseline, *rows), differences, strict=True):
        row["rounding"] = difference > row["error"]
        right = row.get("gradient_error", 0.0) <= _GRADIENT_FACTOR * tolerance
        row["agrees"] = right and row["error"] <= tolerance
    rows = [{"solver": named[row["name"]], **row} for row in rows]
    best = min((row for row in rows if row["agrees"]), key=_rank, default=None)
    return Benchmark(Sequential() if best is None else best["solver"], baseline, tuple(rows))


def _run(problem: Problem, solver: AbstractSolver | None):
    adjoint = solver if problem.adjoint is None else problem.adjoint

    def run(step, us, init):
        solution = problem.solution(step, us, init, solver=solver, adjoint=adjoint)
        return solution.states, solution.stats

    return run


def _over_batch(run):
    def batched(step, us, init):
        return jax.vmap(lambda u, h: run(step, u, h), in_axes=(1, 0), out_axes=(1, 0))(us, init)

    return batched


def _solvers_along(axis: AxisName | None) -> list[AbstractSolver]:
    return [] if axis is None else [TimeSharded(axis), TimeSharded(axis, Newton())]


def _usual_solvers(problem: Problem) -> list[AbstractSolver]:
    step, init, slices = problem.step, problem.init, time_slice(problem.us)
    length = num_steps(problem.us)
    structure = problem.structure
    if structure is None:
        structure = detect_structure(step, init, slices)
    _, _, size, _ = raveler(init)
    exact = problem.algebra is not None or is_affine(step, init, slices)
    solvers: list[AbstractSolver] = [AssociativeScan()] if exact else []
    solvers += [Jacobi(chunk_size=c) for c in (16, 64, 256) if c < length]
    if structure.num_seeds(size) <= 4:
        solvers += [Newton(chunk_size=c) for c in (1, 16) if c < length]
    else:
        solvers += [Newton(chunk_size=c) for c in (16, 64, 256) if c < length]
        solvers += [QuasiNewton(chunk_size=64)] if length > 64 else []
    return solvers
