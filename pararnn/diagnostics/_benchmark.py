"""What do the solvers cost on this machine, and which is fastest?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from .._misc import make_ravel, num_steps, time_slice
from .._norms import agreement_tolerance
from .._one_device import AxisName
from .._recurrence import scan_states
from .._validate import check_tolerance
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
from ._compare import Patience, compare, rank
from ._measurements import Benchmark
from ._places import Places, axis_of, find_places
from ._problem import AnyRecurrence, Problem, check_batch_size, make_problem

# Gradients of weights are sums over all steps, of which the scan's own rounding leaves less.
_GRADIENT_FACTOR = 100


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

    A [`pararnn.Benchmark`][]; after an interrupt from the keyboard, of what was measured so far.

    **Raises:**

    `ValueError` or `TypeError` naming the argument, as [`pararnn.solve`][] does.
    """
    options = (solvers, batch_size, gradient, repetitions, costs, progress)
    return _benchmark(recurrence, xs, init, *options, title="benchmark", patience=Patience())


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
    - `budget`: for how many seconds to measure, about: when they are over no further solver is
        compiled, and what is compiled is run twice. `None` measures all of them to the end.

    **Returns:**

    A [`pararnn.Benchmark`][], whose `solver` is the fastest of those that were measured. An
    interrupt from the keyboard ends the measurement early, as the end of the budget does; a second
    one, or one before two programs are compiled, is raised.

    **Raises:**

    `ValueError` or `TypeError` naming the argument.
    """
    if budget is not None:
        check_tolerance("budget", budget)
    if solvers is not None:
        solvers = [Sequential(), *(s for s in solvers if s != Sequential())]
    options = (solvers, batch_size, gradient, repetitions, False, progress)
    return _benchmark(recurrence, xs, init, *options, title="tune", patience=Patience(budget))


def _benchmark(
    recurrence,
    xs,
    init,
    solvers,
    batch_size,
    gradient,
    repetitions,
    costs,
    progress,
    title,
    patience,
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
        options = (gradient, repetitions, costs, title if progress else None, patience)
        return _measured(one, places, solvers, batch_size, *options)


def _measured(
    one: Problem, places: Places, solvers, batch_size, gradient, repetitions, costs, title, patience
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
    differences: dict[str, float] = {}

    def judge(states, expected):
        if not known:
            known.append(Agreement(problem.step, problem.us, problem.init, expected))
        error = known[0].value_error(states)
        differences[list(runs)[len(differences)]] = known[0].value_difference
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
        patience=patience,
    )
    tolerance = agreement_tolerance(make_ravel(problem.init)[3])
    named = {_describe(solver): solver for solver in solvers}
    for row in (baseline, *rows):
        row["rounding"] = differences[row["name"]] > row["error"]
        right = row.get("gradient_error", 0.0) <= _GRADIENT_FACTOR * tolerance
        row["agrees"] = right and row["error"] <= tolerance
    rows = [{"solver": named[row["name"]], **row} for row in rows]
    best = min((row for row in rows if row["agrees"]), key=rank, default=None)
    left_out = tuple(name for name in named if name not in {row["name"] for row in rows})
    solver = Sequential() if best is None else best["solver"]
    return Benchmark(solver, baseline, tuple(rows), left_out)


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
    _, _, size, _ = make_ravel(init)
    exact = problem.algebra is not None or is_affine(step, init, slices)
    solvers: list[AbstractSolver] = [AssociativeScan()] if exact else []
    solvers += [Jacobi(chunk_size=c) for c in (16, 64, 256) if c < length]
    if structure.num_seeds(size) <= 4:
        solvers += [Newton(chunk_size=c) for c in (1, 16) if c < length]
    else:
        solvers += [Newton(chunk_size=c) for c in (16, 64, 256) if c < length]
        solvers += [QuasiNewton(chunk_size=64)] if length > 64 else []
    return solvers
