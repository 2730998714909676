"""The costs of a solve, counted and not timed: operations, bytes, iterations, temporary memory.

Writes `counts.json`. A test compares the costs of the current code with the committed file, so that
a change which costs more is seen in review, on any machine.
"""

import argparse

import jax
from tqdm import tqdm

from ._measure import RESULTS, Results, markdown
from .speed import Case, measure

CASES = (
    Case("counts", "Elman", 256, size=8, solvers=("default", "Jacobi(16)"), costs=True),
    Case("counts", "GRU", 256, size=8, solvers=("default", "Newton(16)"), costs=True),
    Case("counts", "DiagonalGRU", 256, size=8, solvers=("default", "Newton(1)"), costs=True),
)
# The factor by which each may grow before the test fails. Temporary memory is the compiler's
# choice and differs between releases of JAX; the bytes of a primitive may too.
SLACK = {"iterations": 1.0, "steps": 1.0, "flops": 1.02, "bytes": 1.1, "temporary_bytes": 1.5}
PATH = RESULTS / "counts.json"


def counts(case: Case) -> dict[str, dict[str, int]]:
    """The counts of each solver on a case, and of the scan."""
    found: dict[str, dict[str, int]] = {}
    for row in measure(case, repetitions=1, limit=0.0, title=None)["rows"]:
        numbers = {
            f"{kind} {key}": int(row[kind][key])
            for kind in ("forward", "gradient")
            for key in ("flops", "bytes", "temporary_bytes")
        }
        numbers["iterations"] = row.get("iterations", 0)
        numbers["steps"] = row.get("sequential_steps", case.length)
        found[row["name"]] = numbers
    return found


def slack(name: str) -> float:
    """The factor for a number such as `forward flops`."""
    return SLACK[name.split()[-1]]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser("python -m benchmarks counts", description=__doc__).parse_args(argv)
    jax.config.update("jax_enable_x64", True)  # as in the tests
    results = Results(PATH, fresh=True)
    for case in tqdm(CASES, desc="counts"):
        solvers = counts(case)
        results.put(case.key(), solvers)
        print(f"\n{case.key()}\n\n{markdown([{'solver': s, **c} for s, c in solvers.items()])}")
