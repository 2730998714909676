"""Networks that track a state: which solvers are parallel at all?

Trains a dense GRU on the word problem of a group (parity Z2, S3, A5), then solves one long
sequence with the same weights by every method. "steps" is the critical path: `L` or more means no
better than sequential.
"""

import argparse
from typing import Any

import jax
from tqdm import tqdm

import pararnn as prnn

from . import _groups
from ._measure import markdown, relative_error, save

# Chunk size and number of candidates: somewhat more candidates than the group has elements.
SPECULATION = {"Z2": (16, 4), "S3": (16, 8), "A5": (32, 96)}


def solvers(group: str) -> dict[str, Any]:
    chunk_size, candidates = SPECULATION[group]
    return {
        "Speculative": prnn.Speculative(chunk_size=chunk_size, num_candidates=candidates),
        "Newton": prnn.Newton(chunk_size=chunk_size),
        "QuasiNewton": prnn.QuasiNewton(chunk_size=chunk_size),
        "LevenbergMarquardt": prnn.LevenbergMarquardt(chunk_size=chunk_size, diagonal=True),
        "Jacobi": prnn.Jacobi(chunk_size=chunk_size),
    }


def compare(
    group: str, tracker: _groups.Tracker, length: int, names: list[str]
) -> list[dict[str, Any]]:
    cell = tracker.cell
    tokens = jax.random.randint(jax.random.key(1), (length,), 0, cell.input_size)
    us, init = cell.project(tracker.inputs(tokens)), cell.init_state()

    def run(solver):
        return jax.jit(lambda us: prnn.solve(cell.step, us, init, solver=solver))(us)

    expected = run(prnn.Sequential()).states
    rows = []
    for name in tqdm(names, desc=f"{group}, L = {length}"):
        solution = run(solvers(group)[name])
        rows.append(
            {
                "group": group,
                "L": length,
                "solver": name,
                "chunk": int(solution.stats.chunk_size),
                "iterations": int(solution.stats.iterations),
                "steps": int(solution.stats.sequential_steps),
                "finished sequentially": bool(solution.stats.fallback),
                "error": relative_error(solution.states, expected),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks state_tracking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--groups", nargs="+", default=list(SPECULATION), choices=SPECULATION)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--long", type=int, default=262_144, help="length of the S3 run, 0 for none"
    )
    parser.add_argument("--solvers", nargs="+", default=list(solvers("S3")))
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    results: dict[str, list[dict[str, Any]]] = {"training": [], "solving": []}
    for group in args.groups:
        tracker, report = _groups.train(group)
        results["training"].append(report)
        results["solving"] += compare(group, tracker, args.length, args.solvers)
        if group == "S3" and args.long:
            results["solving"] += compare(group, tracker, args.long, ["Speculative"])
        save("state_tracking", results, args.output)
    for part, rows in results.items():
        print(f"\n{part}\n\n{markdown(rows)}")
