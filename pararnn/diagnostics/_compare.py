"""Measuring functions against a baseline, in turns, on this machine."""

import contextlib
import functools
import time
import types
from collections.abc import Callable, Mapping, Sequence
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


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repetitions: int = 15,
    *,
    warm_up: bool = True,
    limit: float = float("inf"),
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call, A B A B …, after one warm-up call each; waits for every result.

    A function that is much faster than the slowest is called a few times in its turn, and the mean
    counts. After two rounds, ends early once `limit` seconds are spent. Calls `tick` after each.
    """
    for function in functions.values() if warm_up else ():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    begin = time.perf_counter()
    for i in range(repetitions):
        if i >= 2 and time.perf_counter() - begin > limit:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                jax.block_until_ready(function())
            times[name].append((time.perf_counter() - start) / calls[name])
        slowest = max(seconds[0] for seconds in times.values())
        calls = {
            name: int(min(max(_SHARE * slowest / times[name][0], 1), _MOST_CALLS)) for name in times
        }
        tick()
    return times


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

    **Returns:**

    One dictionary per function, with the keys that [`pararnn.Benchmark`][] describes.
    """
    kinds = ("forward", "gradient") if gradient else ("forward",)
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in runs}
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1))  # the first compilation of a process is slow
    weights: Any = None
    shardings: dict[str, Any] = {}
    total = len(kinds) * (len(runs) + repetitions)
    with tqdm(total=total, desc=title, disable=title is None, leave=False) as bar:
        for kind in kinds:
            calls: dict[str, Callable[[], Any]] = {}
            expected: Any = None
            for name, run in runs.items():
                mesh, own = elsewhere.get(name, (None, args))
                arrays, static = eqx.partition(own, eqx.is_array)
                if kind == "forward":
                    function, inputs = _forward(run, static), (arrays,)
                else:
                    here = weights if mesh is None else jax.device_put(weights, shardings[name])
                    function, inputs = _gradient(run, static), (arrays, here)
                row, calls[name] = _compiled(function, inputs, costs, mesh)
                results, other = jax.block_until_ready(calls[name]())
                if kind == "forward":
                    shardings[name] = [x.sharding for x in real_leaves(results)]
                if expected is None:
                    expected = results
                if mesh is not None:
                    results = jax.device_put(results, jax.tree.map(lambda x: x.sharding, expected))
                if kind == "forward":
                    weights = _weights(results) if weights is None else weights
                    rows[name].update(_statistics(other))
                    rows[name]["error"] = judge(results, expected)
                else:
                    rows[name]["gradient_error"] = relative_error(results, expected)
                rows[name][kind] = row
                bar.update()
            times = interleaved(calls, repetitions, warm_up=False, limit=limit, tick=bar.update)
            for name in runs:
                rows[name][kind]["seconds"] = spread(times[name])
                rows[name][kind]["ratio"] = ratio(times, name, next(iter(runs)))
    return list(rows.values())


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
