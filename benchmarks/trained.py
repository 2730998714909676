"""When do solvers accept the states of trained networks, and how exact are these then?

For each network and method: the iterations that were made, the critical path in steps, whether
chunks had to be finished sequentially, and the error of the states beside that of the sequential
run in the same float32, both against a sequential run in float64. And how long the networks
remember.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from tqdm import tqdm

import pararnn as prnn

from ._measure import markdown, other_parts, relative_error, save, scan_states
from ._trained import Trained, load

# By network: Newton's method pushes as many tangents as there are state elements, 256 for most.
METHODS: dict[str, tuple[prnn.solvers.AbstractIterativeSolver, ...]] = {
    "gru": (
        prnn.Newton(chunk_size=16),
        prnn.Newton(chunk_size=64),
        prnn.Jacobi(chunk_size=64),
        prnn.Jacobi(chunk_size=128),
    ),
    "gru_early": (prnn.Newton(chunk_size=16),),
    "lstm": (prnn.Newton(chunk_size=16),),
    "elman": (prnn.Jacobi(chunk_size=64), prnn.Newton(chunk_size=64)),
    "gru_a5": (prnn.Speculative(chunk_size=32, num_candidates=512),),
}
# How many steps of each network, and how many of its methods: the long ones take minutes.
PARTS = {
    "short": {name: (8192 if name == "gru_a5" else 1024, None) for name in METHODS},
    "long": {name: (16_384, 1) for name in METHODS if name != "gru_a5"},
}


def sequential(system: Trained) -> Any:
    return jax.jit(functools.partial(scan_states, system.step))(system.xs, system.init)


def memory(name: str, every: int = 1000, at_most: int = 3000) -> list[int]:
    """After how many steps less than a ten-thousandth is left of small disturbances, one at each
    `every`-th step of a text, in float64."""
    length = 6 * every + at_most
    system = load(name, length, jnp.float64)
    states = sequential(system)

    @jax.jit
    def left(time, key):
        xs, later = (
            jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, time + 1, at_most), tree)
            for tree in (system.xs, states)
        )
        state, flat = jtu.tree_map(lambda h: h[time], states), jtu.tree_leaves
        added = jtu.tree_map(lambda h: 1e-6 * jax.random.normal(key, h.shape, h.dtype), state)
        moved = scan_states(system.step, xs, jtu.tree_map(jnp.add, state, added))
        pairs = zip(flat(moved), flat(later), strict=True)
        squares = sum(jnp.sum((a - b) ** 2, axis=tuple(range(1, a.ndim))) for a, b in pairs)
        return jnp.sqrt(squares / sum(jnp.sum(a**2) for a in flat(added)))

    keys = jax.random.split(jax.random.key(0), 6)
    rows = [np.asarray(left(every // 2 + i * every, key)) for i, key in enumerate(keys)]
    return [int(np.flatnonzero(row >= 1e-4).max(initial=-1)) + 1 for row in rows]


def compare(name: str, length: int, methods: int | None) -> list[dict[str, Any]]:
    exact = sequential(load(name, length, jnp.float64))
    system = load(name, length)
    floor = relative_error(sequential(system), exact)
    rows = []
    for solver in tqdm(METHODS[name][:methods], desc=f"{name}, L = {length}"):

        def run(xs, solver=solver):
            return prnn.solve(system.step, xs, system.init, solver=solver, throw=False)

        solution = jax.jit(run)(system.xs)
        rows.append(
            {
                "network": name,
                "L": length,
                "method": type(solver).__name__,
                "chunk": int(solution.stats.chunk_size),
                "iterations": int(solution.stats.iterations),
                "steps": int(solution.stats.sequential_steps),
                "finished sequentially": bool(solution.stats.fallback),
                "error": relative_error(solution.states, exact),
                "error of the scan": floor,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks trained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=["short"], choices=PARTS)
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = other_parts("trained", args.output, args.parts, PARTS)
    if "short" in args.parts:
        results["memory"] = {name: memory(name) for name in METHODS if name != "gru_a5"}
    for part in args.parts:
        results[part] = []
        for name, (length, methods) in PARTS[part].items():
            results[part] += compare(name, length, methods)
            save("trained", results, args.output)
        print(f"\n{part}\n\n{markdown(results[part])}")
