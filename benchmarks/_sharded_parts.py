"""What `benchmarks sharded` measures, each in a process with its own number of devices."""

import functools
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pararnn as prnn
from pararnn.diagnostics import relative_error, scan_states
from pararnn.diagnostics._compare import interleaved, ratio, spread

from ._cases import CELLS, parse_solver
from ._collectives import collectives

AXIS = "time"
# Collectives that are timed in one program: an entry into it costs more than one of them.
_ROUNDS = 50


class Problem:
    """A recurrence of a cell, on one device and on all, with the functions to be compared.

    The inputs are made by NumPy, so that they are the same in every process.
    """

    def __init__(self, cell: str, size: int, length: int, dtype: str = "float32"):
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self.mesh: Mesh = jax.make_mesh((jax.device_count(),), (AXIS,), (AxisType.Auto,))
        made = CELLS[cell](size, dtype=jnp.dtype(dtype), key=jax.random.key(0))
        self.arrays, self.static = eqx.partition(made, eqx.is_array)
        self.init = made.init_state()
        draw, local = np.random.default_rng(0), jax.local_devices()[0]
        xs = jax.device_put(draw.normal(size=(length, size)).astype(dtype), local)
        self.inputs = eqx.filter_jit(lambda xs: made.project(xs))(xs)
        self.weights = draw.normal(size=(length, size)).astype(dtype)

    def across(self, x: Any) -> Any:
        """An array with its part on each device; each process has all of it, and places its own."""
        x = np.asarray(x)
        lies = NamedSharding(self.mesh, P(AXIS))
        if len(x) % self.mesh.size:
            return jax.device_put(x, NamedSharding(self.mesh, P()))
        return jax.make_array_from_callback(x.shape, lies, lambda index: x[index])

    def scan(self, arrays, us):
        return scan_states(eqx.combine(arrays, self.static).step, us, self.init)

    def solution(self, solver: Any, arrays, us):
        step = eqx.combine(arrays, self.static).step
        return prnn.solve(step, us, self.init, solver=solver, throw=False)

    def states(self, solver: Any):
        return jax.jit(lambda arrays, us: self.solution(solver, arrays, us).states)

    def gradient(self, states: Any):
        def loss(arrays, us, weights):
            found = states(arrays, us)
            return jnp.vdot(found * found, weights)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def _sharded(name: str) -> prnn.TimeSharded:
    return prnn.TimeSharded(AXIS, parse_solver(name))


class Sharded:
    """The same on all devices. Functions are compiled where the mesh is set, which those on one
    device must not be."""

    def __init__(self, problem: Problem, solver: str):
        self.problem, self.solver = problem, _sharded(solver)
        # As in training, the weights are on all devices before.
        here = jax.tree.map(np.asarray, problem.arrays)
        self.arrays = jax.device_put(here, NamedSharding(problem.mesh, P()))
        self.us = jax.tree.map(problem.across, problem.inputs)
        self.weights = problem.across(problem.weights)

    def _compiled(self, run: Any, *args: Any) -> Any:
        with jax.set_mesh(self.problem.mesh):
            compiled = jax.jit(run).lower(self.arrays, *args).compile()
        return compiled, functools.partial(compiled, self.arrays, *args)

    def states(self) -> Any:
        """The compiled function, and what calls it."""
        return self._compiled(self.problem.states(self.solver), self.us)

    def gradient(self) -> Any:
        run = self.problem.gradient(self.problem.states(self.solver))
        return self._compiled(run, self.us, self.weights)

    def apart(self, run: Any, *args: Any) -> Any:
        """What calls a function with the parts of arrays that each device has, as if they were all:
        wrong, but the least work that two devices can do."""
        mapped = jax.shard_map(
            run,
            mesh=self.problem.mesh,
            in_specs=(P(), *[P(AXIS)] * len(args)),
            out_specs=P(AXIS),
            check_vma=False,
        )
        return self._compiled(mapped, *args)[1]

    def report(self) -> dict[str, Any]:
        def run(arrays, us):
            return self.problem.solution(self.solver, arrays, us).stats

        stats = self._compiled(run, self.us)[1]()
        return {
            "iterations": int(stats.iterations),
            "finished sequentially": bool(stats.fallback),
        }


def speed(
    cell: str, size: int, length: int, solver: str, repetitions: int, limit: float
) -> dict[str, Any]:
    """Forward against `lax.scan`, and forward and gradient against our own, both on one device; and
    how many times faster the same is if each device takes its part for all."""
    problem = Problem(cell, size, length)
    sharded, one = Sharded(problem, solver), (problem.arrays, problem.inputs)
    own = problem.gradient(problem.states(None))

    def gradient(arrays, us, weights):
        value, (weights, inputs) = own(arrays, us, weights)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), (value, weights)), inputs

    pairs = {
        "forward": {
            "scan": functools.partial(jax.jit(problem.scan), *one),
            "forward": sharded.states()[1],
            "forward, apart": sharded.apart(problem.scan, sharded.us),
        },
        "gradient": {
            "own gradient": functools.partial(own, *one, jnp.asarray(problem.weights)),
            "gradient": sharded.gradient()[1],
            "gradient, apart": sharded.apart(gradient, sharded.us, sharded.weights),
        },
    }
    seconds, faster, ceiling = {}, {}, {}
    for kind, runs in pairs.items():
        times = interleaved(runs, repetitions, limit=limit / len(pairs))
        seconds |= {name: spread(found) for name, found in times.items()}
        # How many times faster: the time of the other one over ours.
        faster[kind] = ratio(times, next(iter(runs)), kind)
        ceiling[kind] = ratio(times, next(iter(runs)), f"{kind}, apart")
    return {**sharded.report(), "seconds": seconds, "faster": faster, "ceiling": ceiling}


def agreement(cell: str, size: int, length: int, solver: str, dtype: str) -> dict[str, Any]:
    """Errors of values and gradients, against the scan on one device and JAX's derivative of it."""
    problem = Problem(cell, size, length, dtype)
    sharded, one = Sharded(problem, solver), (problem.arrays, problem.inputs)
    states = jax.jit(problem.scan)(*one)
    gradients = problem.gradient(problem.scan)(*one, jnp.asarray(problem.weights))
    here = functools.partial(jax.tree.map, np.asarray)
    return {
        **sharded.report(),
        "value error": relative_error(here(sharded.states()[1]()), here(states)),
        "gradient error": relative_error(here(sharded.gradient()[1]()), here(gradients)),
    }


def traffic(cell: str, size: int, length: int, solver: str) -> dict[str, list[dict[str, Any]]]:
    """The collectives of the compiled programs, the same ones together."""
    sharded = Sharded(Problem(cell, size, length), solver)
    found = {}
    for kind, (compiled, _) in {
        "forward": sharded.states(),
        "gradient": sharded.gradient(),
    }.items():
        same = Counter(collectives(compiled.as_text()))
        found[kind] = [{**one._asdict(), "count": count} for one, count in same.items()]
    return found


def memory(cell: str, size: int, length: int) -> dict[str, int]:
    """What forward and gradient need on each device: arguments, results and all between."""
    problem, several = Problem(cell, size, jax.device_count()), jax.device_count() > 1
    lies = NamedSharding(problem.mesh, P(AXIS)) if several else None

    def whole(x):
        return jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype, sharding=lies)

    shapes = jax.tree.map(whole, (problem.inputs, problem.weights))
    run = problem.gradient(problem.states(_sharded("default") if several else None))
    with jax.set_mesh(problem.mesh):
        found = run.lower(problem.arrays, *shapes).compile().memory_analysis()
    parts = ("argument", "output", "temp")
    return {part: getattr(found, f"{part}_size_in_bytes") for part in parts}


def exchanges(sizes: list[int]) -> dict[str, dict[int, float]]:
    """Seconds of each kind of collective between all devices, by the bytes that each gives."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), (AxisType.Auto,))
    count = jax.device_count()
    ring = [(i, (i + 1) % count) for i in range(count)]
    kinds = {
        "collective-permute": lambda x: jax.lax.ppermute(x, AXIS, ring),
        "all-gather": lambda x: jax.lax.all_gather(x, AXIS)[jax.lax.axis_index(AXIS)],
        "all-reduce": lambda x: jax.lax.pmax(x, AXIS),
    }

    def repeated(exchange):
        # Each needs what the one before it has brought.
        def body(i, x):
            return exchange(x) + 1e-3

        over = jax.shard_map(
            lambda x: jax.lax.fori_loop(0, _ROUNDS, body, x),
            mesh=mesh,
            in_specs=P(AXIS),
            out_specs=P(AXIS),
            check_vma=False,
        )
        return jax.jit(over)

    found: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
    for nbytes in sizes:
        shape, lies = (count * nbytes // 4,), NamedSharding(mesh, P(AXIS))
        x = jax.make_array_from_callback(shape, lies, lambda i, s=shape: np.zeros(s, "float32")[i])
        calls = {kind: functools.partial(repeated(f), x) for kind, f in kinds.items()}
        for kind, times in interleaved(calls, 7, limit=20.0).items():
            found[kind][nbytes] = float(np.median(times)) / _ROUNDS
    return found
