"""Cost of solvers on this machine, and the choice of the fastest."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from .._misc import make_ravel, num_steps, time_slice
from .._recurrence import scan_states
from .._validate import check_tolerance
from ..solvers import (
    AbstractSolver,
    AssociativeScan,
    ElementwiseNewton,
    Jacobi,
    Newton,
    QuasiNewton,
    Sequential,
    TimeSharded,
)
from ..structures import detect_structure, is_affine
from ._agreement import Agreement, agreement_tolerance
from ._arguments import AnyRecurrence, SolveArguments, check_batch_size, solve_arguments
from ._compare import Deadline, compare
from ._measurements import Benchmark
from ._placement import Placement, find_placement, sharded_axis
from ._rows import Measurement, Row

# Gradients of weights are sums over all steps, in which the rounding of the scan itself adds up.
_GRADIENT_FACTOR = 100


def _describe(solver: AbstractSolver | None) -> str:
    """The solver's constructor call, without arguments at their defaults."""
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

    Time (interleaved: A B A B …), compile time, memory, operations and bytes, iterations, critical
    path, and the error against the sequential run. Runs outside of `jit`, on concrete arrays.

    Programs that shard time (a [`pararnn.TimeSharded`][] among the `solvers` or of the layer) run
    on the mesh that is set, or that of `xs`, with inputs placed there beforehand; all others, the
    scan included, run on the first device of the mesh.

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][]. The
        recurrence is measured without `project` and `readout`, which solvers do not affect.
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and optionally the initial state. At least one step.
    - `solvers`: the solvers to measure; an entry `None` is the choice of `solve`. By default, the
        layer's solver or the choice of `solve`, and the usual solvers with several chunk sizes; if
        `xs` is sharded along time, also `TimeSharded`, by itself and with `Newton()`.
    - `batch_size`: how many sequences to measure with `jax.vmap`: `xs`, which is one sequence here
        too, and `xs` rolled along time by further and further. `None` measures `xs` without `vmap`.
    - `gradient`: whether to measure forward and gradient too, with the solver as `adjoint` (or the
        layer's): a quadratic loss of the states and its derivative with respect to `xs`, `init` and
        the weights of a cell or the arrays in a step that is an Equinox module or a method of one,
        against JAX's own derivative of the scan.
    - `repetitions`: how often each is timed.
    - `costs`: whether to count operations and bytes, which takes about as long as compiling.
    - `progress`: whether to show a progress bar.

    **Returns:**

    A [`pararnn.Benchmark`][]; after an interrupt from the keyboard, with the measurements so far.

    **Raises:**

    `ValueError` or `TypeError` naming the argument, as [`pararnn.solve`][] does.
    """
    options = (solvers, batch_size, gradient, repetitions, costs)
    title = "benchmark" if progress else None
    return _benchmark(recurrence, xs, init, *options, title=title, deadline=Deadline())


def tune(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    solvers: Sequence[AbstractSolver] | None = None,
    batch_size: int | None = None,
    gradient: bool = False,
    repetitions: int = 7,
    budget: float | None = None,
    progress: bool = True,
) -> Benchmark:
    """Measures solvers on this machine, to find the fastest that agrees with the sequential run: a
    quick [`pararnn.benchmark`][].

    **Arguments:**

    - `recurrence`, `xs`, `init`, `batch_size`, `gradient`, `repetitions`, `progress`: as for
        [`pararnn.benchmark`][].
    - `solvers`: the candidates; `None` tries the usual ones with several chunk sizes, and the
        layer's. `Sequential` is always among them.
    - `budget`: seconds to measure for, about: afterwards no further solver is compiled, and
        compiled ones run twice. `None` measures all solvers completely.

    **Returns:**

    A [`pararnn.Benchmark`][], whose `solver` is the fastest that agrees. An interrupt from the
    keyboard ends the measurement early, like the end of the budget; a second one, or one before two
    programs are compiled, is raised.

    **Raises:**

    `ValueError` or `TypeError` naming the argument.
    """
    if budget is not None:
        check_tolerance("budget", budget)
    if solvers is not None:
        solvers = [Sequential(), *(s for s in solvers if s != Sequential())]
    options = (solvers, batch_size, gradient, repetitions, False)
    title = "tune" if progress else None
    return _benchmark(recurrence, xs, init, *options, title=title, deadline=Deadline(budget))


def _benchmark(
    recurrence, xs, init, solvers, batch_size, gradient, repetitions, costs, *, title, deadline
) -> Benchmark:
    check_batch_size(batch_size)
    if isinstance(repetitions, bool) or not isinstance(repetitions, int) or repetitions < 1:
        raise ValueError(f"`repetitions` must be a positive Python int; got {repetitions!r}.")
    for solver in solvers or ():
        if solver is not None and not isinstance(solver, AbstractSolver):
            raise TypeError(f"`solvers` must be solver instances or None; got {solver!r}.")
    placement = find_placement(recurrence, xs, init, solvers or ())
    with placement.one_device():
        one = solve_arguments(*placement.on_one((recurrence, xs, init)))
        if num_steps(one.us) == 0:
            raise ValueError("`xs` must have at least one step to measure anything; got 0.")
        if solvers is None:
            solvers = [one.solver] if costs or one.solver is not None else []
            solvers += [Sequential(), *_usual_solvers(one)]
            if placement.axis is not None:
                solvers += [TimeSharded(placement.axis, s) for s in (None, Newton())]
        named = {_describe(solver): solver for solver in solvers}
        options = {"gradient": gradient, "repetitions": repetitions, "costs": costs}
        options |= {"title": title, "deadline": deadline}
        baseline, *rows = _measure(one, placement, named, batch_size, options)
    agreeing = [row for row in rows if row.agrees]
    best = min(agreeing, key=lambda row: row.slowest.seconds.median, default=None)
    left_out = tuple(name for name in named if name not in {row.name for row in rows})
    return Benchmark(Sequential() if best is None else best.solver, baseline, tuple(rows), left_out)


def _measure(
    one: SolveArguments,
    placement: Placement,
    solvers: dict[str, AbstractSolver | None],
    batch_size: int | None,
    options: dict[str, Any],
) -> list[Row]:
    """The rows of the scan and of the solvers, by their names."""
    batch = one if batch_size is None else one.batched(batch_size)

    def scan(step, us, init):
        return scan_states(step if batch_size is None else jax.vmap(step), us, init), None

    args = (one.step, batch.us, batch.init)
    runs: dict[str, Any] = {"lax.scan": scan}
    on_mesh: dict[str, Any] = {}
    for name, solver in solvers.items():
        runs[name] = _run(one, solver, batch_size)
        axis = sharded_axis(solver, one.adjoint)
        if axis is not None:
            on_mesh[name] = placement.on_mesh(axis, args)
    agreement: Agreement | None = None
    rounding: dict[str, bool] = {}

    def judge(states, expected):
        nonlocal agreement
        if agreement is None:
            agreement = Agreement(batch.step, batch.us, batch.init, expected)
        error, difference, _ = agreement.value_error(states)
        rounding[list(runs)[len(rounding)]] = difference > error
        return error

    tolerance = agreement_tolerance(make_ravel(batch.init)[3])
    rows = []
    for row in compare(runs, args, judge=judge, on_mesh=on_mesh, **options):
        forward, gradient = (
            Measurement(**row[k]) if k in row else None for k in ("forward", "gradient")
        )
        right = row.get("gradient_error", 0.0) <= _GRADIENT_FACTOR * tolerance
        judged = {
            "agrees": right and row["error"] <= tolerance,
            "rounding": rounding[row["name"]],
            "solver": solvers.get(row["name"]),
        }
        rows.append(Row(**{**row, "forward": forward, "gradient": gradient, **judged}))
    return rows


def _run(arguments: SolveArguments, solver: AbstractSolver | None, batch_size: int | None):
    adjoint = solver if arguments.adjoint is None else arguments.adjoint

    def run(step, us, init):
        solution = arguments.solve(step, us, init, solver, adjoint)
        return solution.states, solution.stats

    def batched(step, us, init):
        return jax.vmap(lambda u, h: run(step, u, h), in_axes=(1, 0), out_axes=(1, 0))(us, init)

    return run if batch_size is None else batched


def _usual_solvers(arguments: SolveArguments) -> list[AbstractSolver]:
    step, init, slices = arguments.step, arguments.init, time_slice(arguments.us)
    length, size = num_steps(arguments.us), make_ravel(init)[2]
    structure = arguments.structure
    if structure is None:
        structure = detect_structure(step, init, slices)
    exact = arguments.algebra is not None or is_affine(step, init, slices)
    few = structure.num_seeds(size) <= 4
    solvers: list[AbstractSolver] = [AssociativeScan()] if exact else []
    solvers += [Jacobi(chunk_size=c) for c in (16, 64, 256) if c < length]
    solvers += [Newton(chunk_size=c) for c in ((1, 16) if few else (16, 64, 256)) if c < length]
    if few:
        return solvers
    solvers += [ElementwiseNewton(chunk_size=c) for c in (16, 32) if c < length]
    return solvers + ([QuasiNewton(chunk_size=64)] if length > 64 else [])
