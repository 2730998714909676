"""Measurement of functions against a baseline, interleaved, on this machine."""

import contextlib
import functools
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from .._misc import real_leaves
from ..jaxprs._counting import count
from ._agreement import relative_error

# A fast function is called repeatedly, for this share of the slowest one's time, in each round.
_SHARE, _MAX_CALLS = 0.1, 20
# A comparison needs the baseline and one other function.
_MIN_FUNCTIONS = 2


class Spread(NamedTuple):
    """The median of repeated measurements, and their quartiles."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g}–{self.upper:.3g})"


def spread(samples: Sequence[float] | np.ndarray) -> Spread:
    """Median and quartiles of `samples`."""
    lower, median, upper = np.quantile(np.asarray(samples, float), [0.25, 0.5, 0.75])
    return Spread(float(median), float(lower), float(upper))


class Deadline:
    """Ends a measurement when a budget, in seconds, is spent, or at an interrupt from the keyboard.

    - `share`: the share of the budget at which it is over.
    - `catches`: whether it catches an interrupt, or lets it pass.
    """

    def __init__(self, budget: float | None = None, catches: bool = True):
        self._begin = time.perf_counter()
        self.catches = catches
        self._budget = float("inf") if budget is None else budget
        self.share = 1.0
        self.interrupted = False

    @property
    def is_over(self) -> bool:
        return self.interrupted or time.perf_counter() - self._begin > self.share * self._budget

    @contextlib.contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Ends the block at an interrupt from the keyboard; a second one is raised."""
        try:
            yield
        except KeyboardInterrupt:
            if self.interrupted or not self.catches:
                raise
            self.interrupted = True


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repetitions: int = 15,
    *,
    warm_up: bool = True,
    limit: float = float("inf"),
    tick: Callable[[], Any] = lambda: None,
    deadline: Deadline | None = None,
) -> dict[str, list[float]]:
    """Seconds per call, A B A B …, after one warm-up call each; waits for every result.

    A function that is much faster than the slowest is called several times per round, and the mean
    counts. After two rounds, ends early once `limit` seconds or the `deadline` are over; at an
    interrupt, which a `deadline` catches, after one. Calls `tick` after each round.
    """
    deadline = Deadline(catches=False) if deadline is None else deadline
    for function in functions.values() if warm_up else ():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    begin = time.perf_counter()
    with deadline.until_interrupted():
        for i in range(repetitions):
            if i >= 2 and (deadline.is_over or time.perf_counter() - begin > limit):
                break
            for name, function in functions.items():
                start = time.perf_counter()
                for _ in range(calls[name]):
                    jax.block_until_ready(function())
                times[name].append((time.perf_counter() - start) / calls[name])
            share = _SHARE * max(seconds[0] for seconds in times.values())
            calls = {k: int(min(max(share / times[k][0], 1), _MAX_CALLS)) for k in times}
            tick()
    rounds = min(map(len, times.values()))
    if rounds == 0:
        raise KeyboardInterrupt
    return {name: seconds[:rounds] for name, seconds in times.items()}


def ratio(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """The spread of the ratios, round by round, which cancels slow drifts of a shared machine."""
    return spread(np.asarray(times[name]) / np.asarray(times[baseline]))


def compare(
    runs: Mapping[str, Callable[..., tuple[Any, Any]]],
    args: tuple[Any, ...],
    *,
    gradient: bool = True,
    repetitions: int = 7,
    limit: float = float("inf"),
    costs: bool = True,
    title: str | None = None,
    judge: Callable[[Any, Any], float] = relative_error,
    on_mesh: Mapping[str, tuple[Mesh, tuple[Any, ...]]] = types.MappingProxyType({}),
    deadline: Deadline | None = None,
) -> list[dict[str, Any]]:
    """Measures functions that compute the same states; the first is the baseline.

    **Arguments:**

    - `runs`: functions by name; `run(*args)` returns the states, and a [`pararnn.Stats`][] or
        `None`. Statistics may have leading axes: the largest numbers count.
    - `args`: pytrees of arrays and anything else, which is static.
    - `gradient`: whether to measure forward and gradient together as well: the sum of the states'
        squares with fixed random weights, and its derivative with respect to all floating-point
        and complex arrays in `args`.
    - `repetitions`, `limit`: as for `interleaved`.
    - `costs`: whether to count operations and bytes, which compiles and runs each function again.
        Not counted for programs on a mesh, whose work per device the counter does not see.
    - `title`: of a progress bar; `None` for no bar.
    - `judge`: the error of states, from them and those of the baseline.
    - `on_mesh`: for runs on a mesh, by name: the mesh, and `args` as they are placed on it.
    - `deadline`: when it is over, returns what is measured of two functions or more.

    **Returns:**

    One dictionary per function with the fields of [`pararnn.diagnostics.Row`][], without those that
    were not measured; functions that were not timed are left out.
    """
    kinds = ("forward", "gradient") if gradient else ("forward",)
    deadline = Deadline(catches=False) if deadline is None else deadline
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1))  # the first compilation of a process is slow
    comparison = _Comparison(runs, args, costs, judge, on_mesh)
    names, done = list(runs), []
    total = len(kinds) * (len(runs) + repetitions)
    with tqdm(total=total, desc=title, disable=title is None, leave=False) as bar:
        for i, kind in enumerate(kinds):
            if deadline.interrupted:
                break
            deadline.share = (i + 1) / len(kinds)
            options = {"warm_up": False, "limit": limit, "tick": bar.update, "deadline": deadline}
            try:
                calls = _compile_all(comparison, kind, names, deadline, bar)
                times = interleaved(calls, repetitions, **options)
            except KeyboardInterrupt:
                if not deadline.catches or not done:
                    raise
                break
            names = list(calls)
            done.append(kind)
            for name in names:
                comparison.rows[name][kind]["seconds"] = spread(times[name])
                comparison.rows[name][kind]["ratio"] = ratio(times, name, names[0])
    return [comparison.finished(name, done) for name in names]


def _compile_all(
    comparison: "_Comparison", kind: str, names: Sequence[str], deadline: Deadline, bar: tqdm
) -> dict[str, Callable[[], Any]]:
    """The compiled functions, as many as the deadline allows, and two at least."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        if deadline.is_over and len(calls) >= _MIN_FUNCTIONS:
            break
        bar.set_postfix_str(name)
        with deadline.until_interrupted():
            calls[name] = comparison.prepare(kind, name)
        if deadline.interrupted and len(calls) < _MIN_FUNCTIONS:
            raise KeyboardInterrupt
        bar.update()
    return calls


class _Comparison:
    """Rows of the functions so far, and the states, weights and gradient of the baseline, with
    which the others are compared."""

    def __init__(self, runs, args, costs, judge, on_mesh):
        self.rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in runs}
        self._runs, self._args, self._costs = runs, args, costs
        self._judge, self._on_mesh = judge, on_mesh
        self._weights: Any = None
        self._shardings: dict[str, Any] = {}
        self._expected: dict[str, Any] = {}  # by kind

    def prepare(self, kind: str, name: str) -> Callable[[], Any]:
        """Compiles a function, judges what it returns, and returns a call of it."""
        mesh, own = self._on_mesh.get(name, (None, self._args))
        arrays, static = eqx.partition(own, eqx.is_array)
        run, row = self._runs[name], self.rows[name]
        if kind == "forward":
            function, inputs = _forward(run, static), (arrays,)
        else:
            weights = self._weights
            weights = weights if mesh is None else jax.device_put(weights, self._shardings[name])
            function, inputs = _gradient(run, static), (arrays, weights)
        measured, call = _compiled(function, inputs, self._costs, mesh)
        results, other = jax.block_until_ready(call())
        if kind == "forward":
            self._shardings[name] = [x.sharding for x in real_leaves(results)]
        expected = self._expected.setdefault(kind, results)
        if mesh is not None:
            results = jax.device_put(results, jax.tree.map(lambda x: x.sharding, expected))
        if kind == "forward":
            self._weights = _weights(results) if self._weights is None else self._weights
            row.update(_statistics(other))
            row["error"] = self._judge(results, expected)
        else:
            row["gradient_error"] = relative_error(results, expected)
        row[kind] = measured
        return call

    def finished(self, name: str, kinds: Sequence[str]) -> dict[str, Any]:
        """The row of a function, without kinds that were compiled but not timed."""
        untimed = set() if "gradient" in kinds else {"gradient", "gradient_error"}
        return {key: value for key, value in self.rows[name].items() if key not in untimed}


def _compiled(
    function: Callable[..., Any], inputs: tuple[Any, ...], costs: bool, mesh: Mesh | None
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Compiles a function: its costs, and a call of it."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*inputs).compile()
        row: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    row["temporary_bytes"] = temporary_bytes(compiled)
    if costs and mesh is None:
        row.update(count(function, *inputs)._asdict())
    return row, functools.partial(compiled, *inputs)


def _forward(run, static):
    return lambda arrays: run(*eqx.combine(arrays, static))


def _gradient(run, static):
    # A loss whose value and derivative need the states: with a linear one the compiler could remove
    # the states from the baseline.
    def loss(args, weights):
        states, _ = run(*args)
        pairs = zip(weights, real_leaves(states), strict=True)
        return sum(jnp.sum(w * jnp.square(s)) for w, s in pairs)

    def function(arrays, weights):
        value, gradients = eqx.filter_value_and_grad(loss)(eqx.combine(arrays, static), weights)
        return gradients, value

    return function


def _weights(states):
    leaves = real_leaves(states)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]


def temporary_bytes(compiled) -> int | None:
    """The size of the buffers that a compiled function allocates for itself, if it is known."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _statistics(stats) -> dict[str, Any]:
    if stats is None:
        return {}
    return {
        "iterations": int(np.max(stats.iterations)),
        "sequential_steps": int(np.max(stats.sequential_steps)),
        "chunk_size": int(np.max(stats.chunk_size)),
        "fallback": bool(np.any(stats.fallback)),
    }
