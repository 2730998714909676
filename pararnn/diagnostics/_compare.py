"""Measuring functions against a baseline, in turns, on this machine."""

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
from .._norms import relative_error
from ..jaxprs._counting import count

# Fast functions take so much of the slowest one's time in a turn, by so many calls at most.
_SHARE, _MOST_CALLS = 0.1, 20
# To compare at all takes the baseline and one function more.
_FEWEST = 2


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


class Patience:
    """For how long to measure: until the `budget`, in seconds, is spent, or somebody interrupts."""

    def __init__(self, budget: float | None = None):
        self._begin = time.perf_counter()
        self._budget = float("inf") if budget is None else budget
        self._share = 1.0
        self.interrupted = False

    def spend_until(self, share: float) -> None:
        """From now on it is over when this share of the budget is spent."""
        self._share = share

    @property
    def is_over(self) -> bool:
        spent = time.perf_counter() - self._begin
        return self.interrupted or spent > self._share * self._budget

    @contextlib.contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Ends what is done within it at an interrupt from the keyboard; a second one is raised."""
        try:
            yield
        except KeyboardInterrupt:
            if self.interrupted:
                raise
            self.interrupted = True


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repetitions: int = 15,
    *,
    warm_up: bool = True,
    limit: float = float("inf"),
    tick: Callable[[], Any] = lambda: None,
    patience: "Patience | None" = None,
) -> dict[str, list[float]]:
    """Seconds per call, A B A B …, after one warm-up call each; waits for every result.

    A function that is much faster than the slowest is called a few times in its turn, and the mean
    counts. After two rounds, ends early once `limit` seconds, or the `patience`, are spent. Calls
    `tick` after each. With a `patience`, an interrupt ends the rounds, too, after the first one.
    """
    for function in functions.values() if warm_up else ():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    begin = time.perf_counter()
    with contextlib.nullcontext() if patience is None else patience.until_interrupted():
        for i in range(repetitions):
            over = patience is not None and patience.is_over
            if i >= 2 and (over or time.perf_counter() - begin > limit):
                break
            for name, function in functions.items():
                start = time.perf_counter()
                for _ in range(calls[name]):
                    jax.block_until_ready(function())
                times[name].append((time.perf_counter() - start) / calls[name])
            slowest = max(seconds[0] for seconds in times.values())
            calls = {
                name: int(min(max(_SHARE * slowest / times[name][0], 1), _MOST_CALLS))
                for name in times
            }
            tick()
    rounds = min(map(len, times.values()))
    if rounds == 0:
        raise KeyboardInterrupt
    return {name: seconds[:rounds] for name, seconds in times.items()}


def ratio(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """The spread of the ratios pair by pair, which cancels slow drifts of a shared machine."""
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
    elsewhere: Mapping[str, tuple[Mesh, tuple[Any, ...]]] = types.MappingProxyType({}),
    patience: Patience | None = None,
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
    - `costs`: whether to count operations and bytes, which compiles and runs each function anew.
        Not of those that run on a mesh: what they do on each device is not seen.
    - `title`: of a progress bar; `None` for no bar.
    - `judge`: the error of states, given those of the baseline too.
    - `elsewhere`: of runs on a mesh: by name, the mesh, and `args` as they lie there.
    - `patience`: when it is over, what is measured so far is returned, of two functions at least.

    **Returns:**

    One dictionary per function, with the keys that [`pararnn.Benchmark`][] describes; those that
    were not measured in all respects are left out.
    """
    kinds = ("forward", "gradient") if gradient else ("forward",)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1))  # the first compilation of a process is slow
    made = _Comparison(runs, args, costs, judge, elsewhere)
    names, done = list(runs), []
    total = len(kinds) * (len(runs) + repetitions)
    with tqdm(total=total, desc=title, disable=title is None, leave=False) as bar:
        for i, kind in enumerate(kinds):
            if patience is not None and patience.interrupted:
                break
            if patience is not None:
                patience.spend_until((i + 1) / len(kinds))
            options = {"warm_up": False, "limit": limit, "tick": bar.update, "patience": patience}
            try:
                calls = _prepared(made, kind, names, patience, bar)
                times = interleaved(calls, repetitions, **options)
            except KeyboardInterrupt:
                if patience is None or not done:
                    raise
                break
            names = list(calls)
            done.append(kind)
            for name in names:
                made.rows[name][kind]["seconds"] = spread(times[name])
                made.rows[name][kind]["ratio"] = ratio(times, name, names[0])
    return [made.finished(name, done) for name in names]


def rank(row: dict[str, Any]) -> float:
    """The time by which a row of `compare` ranks: with the gradient, if it was measured."""
    return row.get("gradient", row["forward"])["seconds"].median


def _prepared(
    made: "_Comparison", kind: str, names: Sequence[str], patience: Patience | None, bar: tqdm
) -> dict[str, Callable[[], Any]]:
    """The compiled functions, as many as there is patience for, and two at least."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        if patience is not None and patience.is_over and len(calls) >= _FEWEST:
            break
        bar.set_postfix_str(name)
        with contextlib.nullcontext() if patience is None else patience.until_interrupted():
            calls[name] = made.prepare(kind, name)
        if patience is not None and patience.interrupted and len(calls) < _FEWEST:
            raise KeyboardInterrupt
        bar.update()
    return calls


class _Comparison:
    """What is known of the functions so far: their `rows`, and what the next ones need of the
    first."""

    def __init__(self, runs, args, costs, judge, elsewhere):
        self.rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in runs}
        self._runs, self._args, self._costs = runs, args, costs
        self._judge, self._elsewhere = judge, elsewhere
        self._weights: Any = None
        self._shardings: dict[str, Any] = {}
        self._expected: dict[str, Any] = {}  # by kind

    def prepare(self, kind: str, name: str) -> Callable[[], Any]:
        """Compiles a function, judges what it returns, and returns a call of it."""
        mesh, own = self._elsewhere.get(name, (None, self._args))
        arrays, static = eqx.partition(own, eqx.is_array)
        run, row = self._runs[name], self.rows[name]
        if kind == "forward":
            function, inputs = _forward(run, static), (arrays,)
        else:
            here = self._weights
            here = here if mesh is None else jax.device_put(here, self._shardings[name])
            function, inputs = _gradient(run, static), (arrays, here)
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
        """The row of a function, without what was begun and not ended."""
        begun = {"forward", "gradient"} - set(kinds)
        begun |= {"gradient_error"} if "gradient" not in kinds else set()
        return {key: value for key, value in self.rows[name].items() if key not in begun}


def _compiled(
    function: Callable[..., Any], inputs: tuple[Any, ...], costs: bool, mesh: Mesh | None
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """What can be said of a function before it is timed, and a call of it."""
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
    # Value and derivative need the states; those of a linear loss would not, and the compiler could
    # leave the states out of the baseline.
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
