"""Does the package give the numbers of `lax.scan`, and does it store a Jacobian for each step?

Two tables: errors of values and gradients against the scan and its automatic derivative, for
several solvers, lengths and dtypes; and temporary memory of solves of a dense cell in units of one
`L × d × d` array. `python -m benchmarks speed` measures times.
"""

import argparse
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from tqdm import tqdm

import pararnn as prnn
from pararnn.diagnostics import temporary_bytes

from ._measure import markdown, relative_error, save, scan_states

CELLS = {"Elman": prnn.Elman, "GRU": prnn.GRU, "DiagonalGRU": prnn.DiagonalGRU}
SOLVERS = {
    "default": None,
    "Newton": prnn.Newton(),
    "Newton, chunk 64": prnn.Newton(chunk_size=64),
    "Jacobi": prnn.Jacobi(),
}


def problem(cell_name: str, length: int, size: int, dtype: Any):
    key_cell, key_x, key_w = jax.random.split(jax.random.key(0), 3)
    cell = CELLS[cell_name](size, size, dtype=dtype, key=key_cell)
    xs = jax.random.normal(key_x, (length, size), dtype)
    weights = jax.random.normal(key_w, (length, size), dtype)
    return cell, xs, weights


def plain_states(cell, xs):
    return scan_states(cell.step, cell.project(xs), cell.init_state())


def package_states(cell, xs, solver):
    return prnn.solve(cell.step, cell.project(xs), cell.init_state(), solver=solver)


def errors(lengths, size) -> list[dict[str, Any]]:
    rows = []
    cases = [
        (cell, length, dtype)
        for cell in CELLS
        for length in lengths
        for dtype in (jnp.float32, jnp.float64)
    ]
    for cell_name, length, dtype in tqdm(cases, desc="agreement"):
        cell, xs, weights = problem(cell_name, length, size, dtype)

        def loss(states_of, cell, xs, weights=weights):
            states = states_of(cell, xs)
            return jnp.vdot(states, weights), states

        def run(states_of, cell=cell, xs=xs, loss=loss):
            both = eqx.filter_jit(
                eqx.filter_value_and_grad(lambda args: loss(states_of, *args), has_aux=True)
            )
            (_, states), gradients = both((cell, xs))
            return states, gradients

        states, gradients = run(plain_states)
        for name, solver in SOLVERS.items():
            got, got_gradients = run(
                lambda cell, xs, solver=solver: package_states(cell, xs, solver).states
            )
            report = eqx.filter_jit(package_states)(cell, xs, solver).stats
            rows.append(
                {
                    "cell": cell_name,
                    "L": length,
                    "dtype": jnp.dtype(dtype).name,
                    "solver": name,
                    "iterations": int(report.iterations),
                    "sequential steps": int(report.sequential_steps),
                    "value error": relative_error(got, states),
                    "gradient error": relative_error(got_gradients, gradients),
                }
            )
    return rows


def memory(length, size) -> list[dict[str, Any]]:
    cell, xs, weights = problem("GRU", length, size, jnp.float32)
    params, static = eqx.partition(cell, eqx.is_array)
    unit = length * size * size * 4
    rows = []
    for solver in (prnn.Jacobi(), prnn.Newton(), prnn.Newton(chunk_size=1)):

        def states(params, xs, solver=solver):
            cell = eqx.combine(params, static)
            return prnn.solve(
                cell.step, cell.project(xs), cell.init_state(), solver=solver, adjoint=solver
            ).states

        gradient = jax.grad(lambda p, xs, s=states: jnp.vdot(s(p, xs), weights))
        row: dict[str, Any] = {"solver": repr(solver)}
        for kind, function in (("forward", states), ("forward + gradient", gradient)):
            needed = temporary_bytes(jax.jit(function).lower(params, xs).compile())
            row[f"{kind} / (L d d)"] = None if needed is None else needed / unit
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks agreement", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 4_097, 65_536])
    parser.add_argument("--size", type=int, default=32, help="state elements")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = {
        "errors": errors(args.lengths, args.size),
        "memory": memory(4_096, 64),
    }
    for name, rows in results.items():
        print(f"\n{name}\n\n{markdown(rows)}")
    print(f"\nwritten to {save('agreement', results, args.output)}")
