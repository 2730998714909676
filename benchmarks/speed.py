"""How fast are the solvers, against the jitted `lax.scan` of the same cell?

Measures forward, and forward and gradient together, in turns with the scan (A B A B …): median and
quartiles, compile time, temporary memory, iterations, critical path and errors; also the machine's
bandwidth for copies, of which the least traffic (inputs read once, states written once) is a
fraction. Without options it asks the questions of a preset, the biggest first. Results go to a JSON
file after each case: a call that was stopped goes on where it was.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from pararnn.diagnostics import Spread
from pararnn.diagnostics._compare import interleaved, spread

from . import _cases
from ._cases import CELLS, Case
from ._gains import sweep
from ._measure import earlier, environment, markdown

GAINS = "iterations against the Lyapunov exponent"


def copy_bandwidth(megabytes: int) -> dict[str, Any]:
    """Bytes per second, read and written, of `x + 1` on an array of float32."""
    x = jnp.zeros(megabytes * 250_000, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = interleaved({"copy": lambda: copy(x)}, 15)["copy"]
    return {"megabytes": megabytes, "bytes_per_second": spread([2 * x.nbytes / s for s in seconds])}


class Results:
    """A JSON file of one machine, or of what else its results belong to (`about`): a description,
    and one record per case."""

    def __init__(self, path: pathlib.Path, fresh: bool, about: dict[str, Any] | None = None):
        self.path = path
        about = environment() if about is None else about
        self.content: dict[str, Any] = {"environment": about, "copy": None, "cases": {}}
        if path.exists() and not fresh:
            self.content = earlier(path, "add --fresh to begin anew", about)

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.content["cases"][key] = {"date": datetime.date.today().isoformat(), **record}
        self.save()

    def save(self) -> None:
        head = {key: _short(value) for key, value in self.content.items() if key != "cases"}
        lines = [
            f"{json.dumps(k)}: {json.dumps(_short(v))}" for k, v in self.content["cases"].items()
        ]
        text = json.dumps(head)[:-1] + ',\n"cases": {\n' + ",\n".join(lines) + "\n}}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(text)
        partial.replace(self.path)  # never half a file


def _short(value: Any) -> Any:
    """Four digits are more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, (list, tuple)) else value


def seconds_expected(case: Case, done: list[tuple[Case, float]]) -> float:
    """From what the cases so far took: at worst in proportion to the length and the solvers."""
    guesses = [
        seconds
        * max(1.0, case.length / other.length)
        * max(1.0, (1 + len(case.solvers)) / (1 + len(other.solvers)))
        for other, seconds in done
    ]
    return min(guesses, default=0.0)


def run(cases: list[Case], results: Results, *, repetitions, limit, budget, gains) -> None:
    """Measures what is not there yet; `gains` is whether to relate iterations to exponents, after
    the first question."""
    begin = time.perf_counter()
    done: list[tuple[Case, float]] = []
    skipped = 0

    def left() -> float:
        return budget - (time.perf_counter() - begin)

    if results.content["copy"] is None:
        results.content["copy"] = copy_bandwidth(100 if jax.default_backend() == "cpu" else 1000)
        results.save()
    for i, case in enumerate(cases):
        if gains and case.question != cases[0].question:
            gains = False
            if GAINS not in results.content["cases"] and left() > 0:
                results.add(GAINS, {"question": GAINS, **sweep()})
        if case.key() in results.content["cases"]:
            continue
        if seconds_expected(case, done) > left():
            skipped += 1
            continue
        print(f"[{i + 1}/{len(cases)}] {case.question}: {case.key()}", flush=True)
        load, start = os.getloadavg()[0], time.perf_counter()
        measured = _cases.measure(case, repetitions=repetitions, limit=limit, title=case.cell)
        done.append((case, time.perf_counter() - start))
        record = {**case._asdict(), "load": load, "seconds": done[-1][1], **measured}
        results.add(case.key(), record)
    if skipped:
        print(f"{skipped} cases did not fit into {budget:g} seconds; call again to go on.")


def table(content: dict[str, Any], keys: list[str]) -> str:
    """Times in milliseconds, relative to the scan, and relative to the memory floor."""
    rows = []
    bandwidth = content["copy"]["bytes_per_second"][0]
    for key in keys:
        record = content["cases"].get(key)
        for row in record["rows"] if record else ():
            line = {name: record[name] for name in ("cell", "length", "batch", "size", "dtype")}
            line["solver"] = row["name"]
            for kind in ("forward", "gradient"):
                measured = row.get(kind)
                line[f"{kind} / ms"] = 1e3 * measured["seconds"][0] if measured else ""
                line[f"{kind} / scan"] = Spread(*measured["ratio"]) if measured else ""
                floor = record["floor_bytes"][kind] / bandwidth
                line[f"{kind} / floor"] = measured["seconds"][0] / floor if measured else ""
            line["iterations"] = row.get("iterations", "")
            line["steps"] = row.get("sequential_steps", "")
            line["error"] = row["error"]
            rows.append(line)
    return markdown(rows) if rows else "nothing measured"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=("cpu", "gpu"), help="default: by the machine")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for this call")
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="with these options, no preset")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--widths", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32", "float64"))
    parser.add_argument(
        "--solvers",
        nargs="+",
        help="like default, Newton-kernels, Jacobi(64); equinox is its own cell",
    )
    parser.add_argument("--project", action="store_true", help="with the input projection")
    parser.add_argument("--costs", action="store_true", help="count operations and bytes too")
    parser.add_argument("--forward", action="store_true", help="without gradients")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--limit", type=float, default=3.0, help="seconds of timing per table")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    own = (args.cells, args.lengths, args.batches, args.widths, args.dtypes, args.solvers)
    if any(own):
        cases = _chosen(args)
    else:
        cases = list(_cases.preset(args.preset or platform))
    if args.dtypes and "float64" in args.dtypes:
        jax.config.update("jax_enable_x64", True)
    results = Results(pathlib.Path(args.output) / f"speed-{platform}.json", args.fresh)
    stopped = False
    try:
        run(
            cases,
            results,
            repetitions=args.repetitions,
            limit=args.limit,
            budget=args.budget,
            gains=platform == "cpu" and not any(own),  # iterations are the same anywhere
        )
    except KeyboardInterrupt:
        stopped = True
    print(f"\n{table(results.content, [case.key() for case in cases])}\n\nin {results.path}")
    if stopped:
        print("stopped: the same call goes on where it was")
        raise SystemExit(130)


def _chosen(args: argparse.Namespace) -> list[Case]:
    solvers = tuple(args.solvers or ("default",))
    for solver in solvers:
        if solver != _cases.EQUINOX:
            _cases.parse_solver(solver.removesuffix(_cases.NO_KERNELS))
    sizes = itertools.product(
        args.cells or ("GRU", "DiagonalGRU"),
        args.lengths or (4096,),
        args.batches or (1,),
        args.widths or (32,),
        args.dtypes or ("float32",),
    )
    return [
        Case("chosen", *size, solvers, args.project, not args.forward, args.costs) for size in sizes
    ]
