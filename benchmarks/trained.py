"""When do solvers accept the states of trained networks, and how exact are these?

For each network and method: iterations, critical path in steps, whether chunks were finished
sequentially, and the error of the states beside that of a float32 scan, both against a float64
scan. How many steps the networks remember; how much of that goes through their gates; and what
their derivatives take.
"""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from tqdm import tqdm

import pararnn as prnn
from pararnn.diagnostics import scan_states

from . import _gates
from ._measure import Results, Row, markdown, parser, relative_error
from ._systems import sequential, solve, summary, trained

# Newton's method pushes as many tangents as there are state elements, 256 for most networks.
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
TEXT = [name for name in METHODS if name != "gru_a5"]
# Minutes each, on all networks of text.
LONG = (prnn.Newton(chunk_size=16), prnn.Jacobi())


def memory(name: str, every: int = 1000, at_most: int = 3000) -> list[int]:
    """After how many steps less than a ten-thousandth is left of small disturbances, one at each
    `every`-th step of a text, in float64."""
    system = trained(name, 6 * every + at_most, jnp.float64)
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


def rows_of(
    name: str, length: int, methods: tuple[prnn.solvers.AbstractIterativeSolver, ...]
) -> list[Row]:
    exact, system = sequential(trained(name, length, jnp.float64)), trained(name, length)
    floor = relative_error(sequential(system), exact)
    rows = []
    for solver in tqdm(methods, desc=f"{name}, L = {length}"):
        row = {"network": name, "L": length, "method": type(solver).__name__}
        rows.append(row | summary(solve(system, solver), exact) | {"error of the scan": floor})
    return rows


def short(results: Results) -> None:
    results.put("memory", {name: memory(name) for name in TEXT})
    rows: list[Row] = []
    for name, methods in METHODS.items():
        rows += rows_of(name, 1024 if name in TEXT else 8192, methods)
        results.put("short", rows)
    print(markdown(rows))


def long(results: Results) -> None:
    rows: list[Row] = []
    for name in TEXT:
        rows += rows_of(name, 16_384, LONG)
        results.put("long", rows)
    print(markdown(rows))


def gates(results: Results) -> None:
    rows: list[Row] = []
    for name in tqdm(_gates.TEXT, desc="gates"):
        rows += _gates.gates(name)
        results.put("gates", rows)
    print(markdown(rows))


def sweeps(results: Results) -> None:
    rows: list[Row] = []
    for name, length, methods in tqdm(_gates.SWEEPS, desc="sweeps"):
        rows += [_gates.sweeps(name, length, solver) for solver in methods]
        results.put("sweeps", rows)
    print(markdown(rows))


PARTS = {"short": short, "long": long, "gates": gates, "sweeps": sweeps}


def main(argv: list[str] | None = None) -> None:
    args = parser("trained", __doc__, list(PARTS)).parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = Results(args.output / "trained.json", fresh=set(args.parts) == set(PARTS))
    for part in args.parts:
        PARTS[part](results)
