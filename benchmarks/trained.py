"""When do solvers accept the states of trained networks, and how exact are these then?

For each network and method: the iterations that were made, the critical path in steps, whether
chunks had to be finished sequentially, and the error of the states beside that of the sequential
run in the same float32, both against a sequential run in float64.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
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
    for part in args.parts:
        results[part] = []
        for name, (length, methods) in PARTS[part].items():
            results[part] += compare(name, length, methods)
            save("trained", results, args.output)
        print(f"\n{part}\n\n{markdown(results[part])}")
