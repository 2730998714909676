"""How many iterations does each method need, on systems from forgetful to chaotic?

Writes a table, JSON and a plot: for each system and method the iterations, the critical path in
steps, whether chunks had to be finished sequentially, and the error against a sequential run in
float64 beside that of a sequential run in the same float32. For a chaotic system no float32 run
follows the float64 one; what counts there is the last column: by how much, relative to the state's
scale, any returned state differs from the step of the one before it.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from tqdm import tqdm

import pararnn as prnn
from pararnn._misc import previous_states

from . import _groups
from ._measure import (
    compile_seconds,
    markdown,
    other_parts,
    ratio,
    relative_error,
    save,
    scan_states,
)
from ._systems import SWEEP, SYSTEMS, System, gru

METHODS: dict[str, prnn.AbstractSolver] = {
    "Newton, 1": prnn.Newton(chunk_size=1, max_iters=200),
    "QuasiNewton, 1": prnn.QuasiNewton(chunk_size=1, max_iters=200),
    "Jacobi, 16": prnn.Jacobi(chunk_size=16),
    "Jacobi, 64": prnn.Jacobi(chunk_size=64),
    "Jacobi, 256": prnn.Jacobi(chunk_size=256),
    "Newton, 64": prnn.Newton(chunk_size=64),
    "LevenbergMarquardt, 1": prnn.LevenbergMarquardt(chunk_size=1),
    "LevenbergMarquardt, 64": prnn.LevenbergMarquardt(chunk_size=64),
}
CHOSEN = "chosen for a GPU"


def sequential(system: System):
    return jax.jit(functools.partial(scan_states, system.step))(system.xs, system.init)


def defect(system: System, states: Any) -> float:
    """By how much a state differs from the step of the one before it."""
    before = previous_states(system.init, states)
    with jax.default_matmul_precision("highest"):
        images = jax.jit(jax.vmap(system.step))(before, system.xs)
    return relative_error(images, states)


def solve_by_all(
    name: str, system: System, exact: Any, methods: dict[str, prnn.AbstractSolver]
) -> list[dict[str, Any]]:
    exponent = float(prnn.lyapunov(*system).exponent)
    chosen, _ = prnn.select_solver(*system, platform="gpu")
    states = sequential(system)
    common = {"system": name, "exponent": exponent}
    rows = [
        common
        | {
            "method": "lax.scan",
            "chunk": "",
            "iterations": "",
            "steps": len(jtu.tree_leaves(states)[0]),
            "finished sequentially": "",
            "error": relative_error(states, exact),
            "defect": defect(system, states),
        }
    ]
    for method, solver in (methods | {CHOSEN: chosen}).items():

        def run(xs, init, solver=solver):
            return prnn.solve(system.step, xs, init, solver=solver, throw=False)

        solution = jax.jit(run)(system.xs, system.init)
        stats = solution.stats
        rows.append(
            common
            | {
                "method": method,
                "chunk": int(stats.chunk_size),
                "iterations": int(stats.iterations),
                "steps": int(stats.sequential_steps),
                "finished sequentially": bool(stats.fallback),
                "error": relative_error(solution.states, exact),
                "defect": defect(system, solution.states),
            }
        )
    return rows


def compare(length: int, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in tqdm(names, desc="systems"):
        exact = sequential(SYSTEMS[name](length, jnp.float64))
        rows += solve_by_all(name, SYSTEMS[name](length, jnp.float32), exact, METHODS)
    return rows


def sweep(length: int) -> list[dict[str, Any]]:
    rows = []
    chosen = {k: METHODS[k] for k in ("Newton, 1", "Newton, 64", "Jacobi, 64")}
    for gain in tqdm(SWEEP, desc="GRU, gains"):
        exact = sequential(gru(gain, length, 8, jnp.float64))
        rows += solve_by_all(f"GRU, 8 units, gain {gain}", gru(gain, length, 8), exact, chosen)
    return rows


def damping(length: int = 512, size: int = 8) -> list[dict[str, Any]]:
    """Adaptive damping against the best constant `μ = 1/σ²`, on a GRU of gain 3."""
    system = gru(3.0, length, size)
    exact = sequential(gru(3.0, length, size, jnp.float64))
    constants = [10.0**k for k in range(-6, 3)]
    rows = []
    for value in (None, *tqdm(constants, desc="damping")):
        solver = prnn.LevenbergMarquardt(chunk_size=1, damping=value, max_iters=400)
        solution = prnn.solve(*system, solver=solver, throw=False)
        rows.append(
            {
                "damping": "adaptive" if value is None else value,
                "iterations": int(solution.stats.iterations),
                "finished sequentially": bool(solution.stats.fallback),
                "error": relative_error(solution.states, exact),
            }
        )
    return rows


def word_problem(length: int = 4096) -> list[dict[str, Any]]:
    """S5 as the linear recurrence of its permutation matrices, which one scan solves exactly."""
    group = _groups.make_group("S5")
    generators = group.elements[group.generators]
    rng = np.random.default_rng(0)
    letters = rng.integers(0, len(generators), length)
    matrices = jnp.asarray(np.eye(5, dtype=np.float32)[generators].swapaxes(1, 2))

    def step(state, letter):
        return matrices[letter] @ state

    word, init = jnp.asarray(letters), jnp.arange(5, dtype=jnp.float32)
    states = sequential(System(step, word, init))
    rows = []
    for solver in (prnn.AssociativeScan(), prnn.Newton(chunk_size=1), prnn.Newton()):
        solution = prnn.solve(step, word, init, solver=solver)
        rows.append(
            {
                "solver": type(solver).__name__,
                "chunk": int(solution.stats.chunk_size),
                "iterations": int(solution.stats.iterations),
                "error": relative_error(solution.states, states),
            }
        )
    return rows


def compile_times(length: int = 16_384) -> list[dict[str, Any]]:
    """Seconds to compile the forward pass, as ratios to the scan's: median and quartiles."""
    system = gru(1.0, length)
    solvers = {
        "Sequential": prnn.Sequential(),
        "Newton": prnn.Newton(),
        "Newton, chunk 1": prnn.Newton(chunk_size=1),
        "QuasiNewton": prnn.QuasiNewton(),
        "Picard": prnn.Picard(),
        "Jacobi": prnn.Jacobi(),
        "LevenbergMarquardt": prnn.LevenbergMarquardt(),
        "Speculative": prnn.Speculative(),
    }

    def solve(xs, init, solver):
        return prnn.solve(system.step, xs, init, solver=solver).states

    functions = {name: functools.partial(solve, solver=s) for name, s in solvers.items()}
    functions["lax.scan"] = functools.partial(scan_states, system.step)
    makes = {name: lambda f=f: jax.jit(f) for name, f in functions.items()}
    times = compile_seconds(makes, system.xs, system.init, repetitions=7)
    return [
        {"solver": name, "compile / scan": str(ratio(times, name, "lax.scan"))} for name in solvers
    ]


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Critical path in steps by system and method; hollow where the finish was sequential."""
    import matplotlib.figure

    colours = ["#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#009E73", "#999999"]
    markers = "osv^<>DXP"
    systems = list(dict.fromkeys(row["system"] for row in rows))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "lax.scan"]
    figure = matplotlib.figure.Figure(figsize=(9, 0.6 + 0.45 * len(systems)), layout="tight")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        chosen = [row for row in rows if row["method"] == method]
        colour = "#000000" if method == CHOSEN else colours[i % len(colours)]
        offset = 0.6 * (i / len(methods) - 0.5)
        for hollow in (False, True):
            part = [row for row in chosen if row["finished sequentially"] is hollow]
            axes.scatter(
                [row["steps"] for row in part],
                [systems.index(row["system"]) + offset for row in part],
                marker=markers[i % len(markers)],
                s=28,
                facecolors="none" if hollow else colour,
                edgecolors=colour,
                label=None if hollow else method,
            )
    lengths = [row["steps"] for row in rows if row["method"] == "lax.scan"]
    axes.axvline(lengths[0], color="#555555", linestyle="--", linewidth=1, label="lax.scan")
    axes.set_yticks(
        range(len(systems)),
        [
            f"{s}  (λ = {next(r['exponent'] for r in rows if r['system'] == s):.2f})"
            for s in systems
        ],
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("critical path, steps (hollow: finished sequentially)")
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


# What is measured, in this order.
PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "systems": lambda args: compare(args.length, args.systems),
    "gains": lambda args: sweep(args.length),
    "damping": lambda args: damping(),
    "word problem": lambda args: word_problem(),
    "compile": lambda args: compile_times(),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--output", default="benchmarks/results", help="folder of JSON and plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = other_parts("convergence", args.output, args.parts, PARTS)
    for part in args.parts:
        results[part] = PARTS[part](args)
        print(f"\n{part}\n\n{markdown(results[part])}")
        path = save("convergence", results, args.output)
        if part in ("systems", "gains"):
            rows = results.get("systems", []) + results.get("gains", [])
            plot(rows, str(path.with_suffix(".png")))


if __name__ == "__main__":
    main()
