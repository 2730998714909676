"""Networks that track a state: which solvers are parallel at all?

Trains a dense GRU on the word problem of a group (parity Z2, S3, A5), then solves one long
sequence with the same weights by every method. "steps" is the critical path: `L` or more means no
better than sequential.
"""

from typing import Any

import jax
from tqdm import tqdm

import pararnn as prnn

from ._measure import Results, Row, markdown, parser
from ._systems import of_cell, sequential, solve, summary
from ._tracker import Tracker, train

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


def rows_of(group: str, tracker: Tracker, length: int, methods: dict[str, Any]) -> list[Row]:
    tokens = jax.random.randint(jax.random.key(1), (length,), 0, tracker.cell.input_size)
    system = of_cell(tracker.cell, tracker.inputs(tokens))
    expected = sequential(system)
    return [
        {"group": group, "L": length, "solver": name, **summary(solve(system, solver), expected)}
        for name, solver in tqdm(methods.items(), desc=f"{group}, L = {length}")
    ]


def main(argv: list[str] | None = None) -> None:
    command = parser("state_tracking", __doc__)
    command.add_argument("--groups", nargs="+", default=list(SPECULATION), choices=SPECULATION)
    command.add_argument("--length", type=int, default=8192)
    command.add_argument(
        "--long", type=int, default=262_144, help="length of the S3 run, 0 for none"
    )
    args = command.parse_args(argv)
    results = Results(args.output / "state_tracking.json", fresh=True)
    rows: list[Row] = []
    for group in args.groups:
        methods = solvers(group)
        tracker = train(group)
        rows += rows_of(group, tracker, args.length, methods)
        if group == "S3" and args.long:
            rows += rows_of(group, tracker, args.long, {"Speculative": methods["Speculative"]})
        results.put("solving", rows)
    print(markdown(rows))
