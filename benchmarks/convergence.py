"""Iterations of each method on recurrences from forgetful to chaotic; damping; time to compile.

The error is against a float64 scan. Of a chaotic system no float32 run follows the float64 one; its
"defect" counts: the largest difference, relative to the state's scale, between any returned state
and the step of the state before it.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import pararnn as prnn
from pararnn._misc import previous_states
from pararnn.diagnostics import scan_states

from ._measure import Results, Row, markdown, parser, ratio, relative_error
from ._systems import SYSTEMS, System, gru, sequential, solve, summary

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
GAINS = (1, 2, 3, 5, 10, 30)  # of a GRU with 8 units


def defect(system: System, states: Any) -> float:
    """The largest relative difference between a state and the step of the state before it."""
    before = previous_states(system.init, states)
    with jax.default_matmul_precision("highest"):
        images = jax.jit(jax.vmap(system.step))(before, system.xs)
    return relative_error(images, states)


def rows_of(name: str, system: System, exact: Any, methods: dict[str, Any]) -> list[Row]:
    """One row per method, and one for the solver that is chosen for a GPU."""
    common = {"system": name, "exponent": float(prnn.lyapunov(*system).exponent)}
    chosen, _ = prnn.select_solver(*system, platform="gpu")
    rows = []
    for method, solver in (methods | {"chosen for a GPU": chosen}).items():
        solution = solve(system, solver)
        row = {**common, "method": method, **summary(solution, exact)}
        rows.append(row | {"defect": defect(system, solution.states)})
    return rows


def systems(length: int) -> list[Row]:
    rows = []
    for name, make in tqdm(SYSTEMS.items(), desc="systems"):
        exact = sequential(make(length, jnp.float64))
        rows += rows_of(name, make(length, jnp.float32), exact, METHODS)
    return rows


def gains(length: int) -> list[Row]:
    methods = {k: METHODS[k] for k in ("Newton, 1", "Newton, 64", "Jacobi, 64")}
    rows = []
    for gain in tqdm(GAINS, desc="GRU, gains"):
        wide, system = (gru(gain, length, dtype, 8) for dtype in (jnp.float64, jnp.float32))
        rows += rows_of(f"GRU, 8 units, gain {gain}", system, sequential(wide), methods)
    return rows


def damping(length: int) -> list[Row]:
    """Adaptive damping against constants `μ = 1/σ²`, on a GRU of gain 3."""
    wide, system = (gru(3.0, length // 4, dtype, 8) for dtype in (jnp.float64, jnp.float32))
    exact, rows = sequential(wide), []
    for value in (None, *tqdm([10.0**k for k in range(-6, 3)], desc="damping")):
        solver = prnn.LevenbergMarquardt(chunk_size=1, damping=value, max_iters=400)
        label = "adaptive" if value is None else value
        rows.append({"damping": label, **summary(solve(system, solver), exact)})
    return rows


def compile_times(length: int) -> list[Row]:
    """Seconds to trace, lower and compile the forward pass, as ratios to the scan's: median and
    quartiles of 7 turns."""
    system = gru(1.0, 8 * length)
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

    def states(xs, init, solver):
        return prnn.solve(system.step, xs, init, solver=solver).states

    functions = {name: functools.partial(states, solver=s) for name, s in solvers.items()}
    functions["lax.scan"] = functools.partial(scan_states, system.step)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(7):
        for name, function in functions.items():
            start = time.perf_counter()
            # A new function each time, or JAX would not trace it again.
            jax.jit(lambda *args, f=function: f(*args)).lower(system.xs, system.init).compile()
            times[name].append(time.perf_counter() - start)
    return [
        {"solver": name, "compile / scan": str(ratio(times, name, "lax.scan"))} for name in solvers
    ]


PARTS = {"systems": systems, "gains": gains, "damping": damping, "compile": compile_times}


def main(argv: list[str] | None = None) -> None:
    command = parser("convergence", __doc__, list(PARTS))
    command.add_argument("--length", type=int, default=2048, help="steps of each system")
    args = command.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = Results(args.output / "convergence.json", fresh=set(args.parts) == set(PARTS))
    for part in args.parts:
        rows = PARTS[part](args.length)
        results.put(part, rows)
        print(f"\n{part}\n\n{markdown(rows)}")
