"""Does the package give the values and the gradients of `lax.scan` and its automatic derivative?"""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from tqdm import tqdm

import pararnn as prnn

from ._measure import Results, Row, markdown, parser, relative_error
from ._systems import CELLS, scanned, solved

SOLVERS = {
    "default": None,
    "Newton": prnn.Newton(),
    "Newton, chunk 64": prnn.Newton(chunk_size=64),
    "Jacobi": prnn.Jacobi(),
}


def rows_of(cell_name: str, length: int, size: int, dtype: Any) -> list[Row]:
    key_cell, key_x, key_w = jax.random.split(jax.random.key(0), 3)
    cell = CELLS[cell_name](size, dtype=dtype, key=key_cell)
    xs = jax.random.normal(key_x, (length, size), dtype)
    weights = jax.random.normal(key_w, (length, size), dtype)

    @eqx.filter_jit
    def run(solve, cell, xs):
        def loss(args):
            cell, xs = args
            states, stats = solve(cell, cell.project(xs))
            return jnp.vdot(states, weights), (states, stats)

        (_, aux), gradients = eqx.filter_value_and_grad(loss, has_aux=True)((cell, xs))
        return aux, gradients

    (states, _), gradients = run(scanned, cell, xs)
    rows = []
    for name, solver in SOLVERS.items():
        (got, stats), got_gradients = run(
            lambda cell, us, solver=solver: solved(cell, us, solver), cell, xs
        )
        rows.append(
            {
                "cell": cell_name,
                "L": length,
                "dtype": jnp.dtype(dtype).name,
                "solver": name,
                "iterations": int(stats.iterations),
                "value error": relative_error(got, states),
                "gradient error": relative_error(got_gradients, gradients),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    command = parser("agreement", __doc__)
    command.add_argument("--lengths", type=int, nargs="+", default=[1_000, 4_097, 65_536])
    command.add_argument("--size", type=int, default=32, help="state elements")
    args = command.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results, rows = Results(args.output / "agreement.json", fresh=True), []
    names, dtypes = ("Elman", "GRU", "DiagonalGRU"), (jnp.float32, jnp.float64)
    cases: list[Any] = list(itertools.product(names, args.lengths, dtypes))
    for name, length, dtype in tqdm(cases, desc="agreement"):
        rows += rows_of(name, length, args.size, dtype)
        results.put("errors", rows)
    print(markdown(rows))
