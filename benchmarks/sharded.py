"""One sequence on several devices, against one: speed-up, errors, memory, traffic.

All devices are CPU devices of this process. Only as many as the machine has cores run side by side,
so times are of two. `speed` is measured with the memory pages of the system; call it once more with
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment for huge ones.
"""

import functools
import itertools
import os
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import pararnn as prnn
from tools.collectives import collectives

from ._measure import Results, Row, interleaved, parser, ratio, relative_error, spread
from ._solvers import parse_solver
from ._systems import CELLS, scanned, solved

AXIS, DEVICES = "time", 8
NAMES, SIZES = ("Elman", "GRU", "DiagonalGRU"), (64, 256)


class Problem:
    """A cell and its inputs on one device, and the functions to compare.

    - `args`: the cell's arrays, and its projected inputs; `weights` are those of the loss.
    """

    def __init__(self, cell: str, size: int, length: int, dtype: str = "float32"):
        made = CELLS[cell](size, dtype=jnp.dtype(dtype), key=jax.random.key(0))
        arrays, self.static = eqx.partition(made, eqx.is_array)
        xs, weights = np.random.default_rng(0).normal(size=(2, length, size)).astype(dtype)
        self.args = arrays, eqx.filter_jit(lambda cell, xs: cell.project(xs))(made, xs)
        self.weights = jnp.asarray(weights)

    def scan(self, arrays, us):
        return scanned(eqx.combine(arrays, self.static), us)[0]

    def states(self, solver: Any):
        return lambda *args: self.solve(solver, *args)[0]

    def solve(self, solver: Any, arrays, us):
        return solved(eqx.combine(arrays, self.static), us, solver)

    def gradient(self, states: Any):
        """The loss and its gradients with respect to parameters and inputs."""

        def loss(arrays, us, weights):
            found = states(arrays, us)
            return jnp.vdot(found * found, weights)

        return jax.value_and_grad(loss, argnums=(0, 1))


class Sharded:
    """The same problem with time sharded over the first `devices` devices, compiled where the mesh
    is set."""

    def __init__(self, problem: Problem, solver: str, devices: int):
        self.problem, self.solver = problem, prnn.TimeSharded(AXIS, parse_solver(solver))
        some = jax.devices()[:devices]
        self.mesh = jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=some)

    def sharding(self, length: int) -> NamedSharding:
        """By time; arrays whose length the devices do not divide are replicated."""
        return NamedSharding(self.mesh, P() if length % self.mesh.size else P(AXIS))

    def place(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, self.sharding(len(x))), tree)

    def compile(self, run: Any, *args: Any) -> Any:
        """The compiled function, and the call of it with the arrays of the cell before `args`."""
        # As in training, the parameters are on all devices before.
        arrays = jax.device_put(self.problem.args[0], NamedSharding(self.mesh, P()))
        with jax.set_mesh(self.mesh):
            compiled = jax.jit(run).lower(arrays, *args).compile()
        return compiled, functools.partial(compiled, arrays, *args)

    def states(self) -> Any:
        return self.compile(self.problem.states(self.solver), self.place(self.problem.args[1]))

    def gradient(self) -> Any:
        run = self.problem.gradient(self.problem.states(self.solver))
        return self.compile(run, *self.place((self.problem.args[1], self.problem.weights)))

    def stats(self) -> Row:
        def run(*args):
            return self.problem.solve(self.solver, *args)[1]

        stats = self.compile(run, self.place(self.problem.args[1]))[1]()
        return {
            "iterations": int(stats.iterations),
            "finished sequentially": bool(stats.fallback),
        }

    def without_exchange(self, run: Any, *args: Any) -> Any:
        """A call in which each device treats its shards as the whole sequence: wrong, but the least
        work that two devices can do."""
        specs = (P(), *[P(AXIS)] * len(args))
        mapped = jax.shard_map(
            run, mesh=self.mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False
        )
        return self.compile(mapped, *self.place(args))[1]


# --- parts ------------------------------------------------------------------------------------


def speed_up(case: Row, repetitions: int, limit: float) -> Row:
    """Forward against `lax.scan`, and forward and gradient against our own, both on one device; and
    how many times faster the same is without any exchange."""
    problem = Problem(case["cell"], case["size"], case["length"])
    sharded, (arrays, us) = Sharded(problem, case["solver"], 2), problem.args
    own = problem.gradient(problem.states(None))

    def gradient(arrays, us, weights):
        value, (weights, inputs) = own(arrays, us, weights)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), (value, weights)), inputs

    pairs = {
        "forward": {
            "scan": functools.partial(jax.jit(problem.scan), arrays, us),
            "forward": sharded.states()[1],
            "forward, apart": sharded.without_exchange(problem.scan, us),
        },
        "gradient": {
            "own gradient": functools.partial(jax.jit(own), arrays, us, problem.weights),
            "gradient": sharded.gradient()[1],
            "gradient, apart": sharded.without_exchange(gradient, us, problem.weights),
        },
    }
    found: Row = {"seconds": {}, "faster": {}, "ceiling": {}}
    for kind, runs in pairs.items():
        times = interleaved(runs, repetitions, limit=limit / len(pairs))
        found["seconds"] |= {name: spread(seconds) for name, seconds in times.items()}
        baseline = next(iter(runs))
        found["faster"][kind] = ratio(times, baseline, kind)
        found["ceiling"][kind] = ratio(times, baseline, f"{kind}, apart")
    return {**case, "load": os.getloadavg()[0], **sharded.stats(), **found}


def speed(length: int, repetitions: int, limit: float) -> list[Row]:
    pages = "huge" if "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "") else "small"
    cases = [
        {"cell": cell, "size": size, "length": length, "solver": "default", "pages": pages}
        for cell, size in itertools.product(NAMES, SIZES)
    ]
    return [speed_up(case, repetitions, limit) for case in tqdm(cases, desc="speed")]


def errors(case: Row, devices: int) -> Row:
    """Errors of values and gradients, against `lax.scan` and its automatic derivative."""
    problem = Problem(case["cell"], case["size"], case["length"], case["dtype"])
    sharded = Sharded(problem, case["solver"], devices)
    states = jax.jit(problem.scan)(*problem.args)
    gradients = jax.jit(problem.gradient(problem.scan))(*problem.args, problem.weights)
    here = functools.partial(jax.device_put, device=jax.devices()[0])
    return {
        "devices": devices,
        **case,
        **sharded.stats(),
        "value error": relative_error(here(sharded.states()[1]()), states),
        "gradient error": relative_error(here(sharded.gradient()[1]()), gradients),
    }


def agreement(length: int) -> list[Row]:
    cases = itertools.product((1, 2, 4, 8), NAMES, ("default", "Newton"), ("float32", "float64"))
    rows = []
    for devices, cell, solver, dtype in tqdm(list(cases), desc="agreement"):
        case = {"cell": cell, "size": 32, "length": length, "solver": solver, "dtype": dtype}
        rows.append(errors(case, devices))
        jax.clear_caches()
    return rows


def _whole(x, length, sharding):
    return jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype, sharding=sharding)


def long(length: int) -> Row:
    """A sequence that is long for one device: the bytes of arguments, results and temporaries of
    forward and gradient on each device; and its errors."""
    case = {"cell": "DiagonalGRU", "size": 8, "length": length}
    needed = {}
    for devices in (1, DEVICES):
        problem = Problem("DiagonalGRU", 8, devices)
        sharded = Sharded(problem, "default", devices)

        shapes = jax.tree.map(
            functools.partial(_whole, length=length, sharding=sharded.sharding(length)),
            (problem.args[1], problem.weights),
        )
        run = problem.gradient(problem.states(sharded.solver if devices > 1 else None))
        found = sharded.compile(run, *shapes)[0].memory_analysis()
        parts = ("argument", "output", "temp")
        needed[str(devices)] = {part: getattr(found, f"{part}_size_in_bytes") for part in parts}
    one, share = (sum(sizes.values()) for sizes in needed.values())
    found = errors({**case, "solver": "default", "dtype": "float32"}, DEVICES)
    return {**case, "bytes": needed, "share of one device": share / one, **found}


def traffic(length: int) -> list[Row]:
    """The collectives of the compiled programs on eight devices, equal ones counted."""
    rows = []
    cases = list(itertools.product(NAMES[1:], SIZES, ("default", "Newton")))
    for cell, size, solver in tqdm(cases, desc="traffic"):
        row: Row = {"cell": cell, "size": size, "length": length, "solver": solver}
        sharded = Sharded(Problem(cell, size, length), solver, DEVICES)
        compiled = {"forward": sharded.states()[0], "gradient": sharded.gradient()[0]}
        for kind, program in compiled.items():
            equal = Counter(collectives(program.as_text()))
            row[kind] = [{**one._asdict(), "count": count} for one, count in equal.items()]
        rows.append(row)
    return rows


PARTS = ("speed", "agreement", "long", "traffic")


def main(argv: list[str] | None = None) -> None:
    command = parser("sharded", __doc__, PARTS)
    command.add_argument("--length", type=int, default=65_536, help="64 times as many in `long`")
    command.add_argument("--repetitions", type=int, default=41)
    command.add_argument("--limit", type=float, default=20.0, help="seconds of timing per case")
    args = command.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", DEVICES)  # before JAX starts
    results = Results(args.output / "sharded.json", fresh=set(args.parts) == set(PARTS))
    for part in args.parts:
        jax.config.update("jax_enable_x64", part == "agreement")
        if part == "speed":
            rows = speed(args.length, args.repetitions, args.limit)
            others = results.content.get("speed", [])
            value = [r for r in others if r["pages"] != rows[0]["pages"]] + rows
        elif part == "agreement":
            value = agreement(args.length // 16 + 3)  # no multiple of the devices
        else:
            value = long(64 * args.length) if part == "long" else traffic(args.length)
        results.put(part, value)
    print(f"written to {results.path}")
