"""What would a GPU run? Counted on any machine; where there is a GPU, measured there too.

XLA compiles each case for the GPU, which needs none: device operations, launches by the host,
loops, memory, registers. The trips of a loop are counted by running the same solver here. From
these counts follows a *predicted* time, which is not a measurement. Results go to a JSON file after
each case; the same call continues an interrupted one. `make gpu-check` creates the environment that
this needs.
"""

import argparse
import importlib
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ._compile import prepare

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"


def chosen_cases(parts: Sequence[str] | None, cases: Sequence[Any]) -> list[Any]:
    """The cases whose keys contain one of `parts`; all for `None`."""
    found = [case for case in cases if parts is None or any(p in case.key() for p in parts)]
    if not found:
        keys = "\n".join(f"  {case.key()}" for case in cases)
        raise SystemExit(f"`--cases` must be parts of these names; got {parts}:\n{keys}")
    return found


def check(path: pathlib.Path, found: Mapping[str, Any], grown: Any) -> None:
    """Exits with 1 if a count has grown; prints a note instead if another JAX counted."""
    committed = json.loads(path.read_text())
    versions = [content["environment"]["jax"] for content in (committed, found)]
    if versions[0] != versions[1]:
        print(f"not compared: the counts in {path} are of JAX {versions[0]}, not {versions[1]}")
        return
    complaints = grown(committed, found)
    print("\n".join(complaints) or "no count has grown")
    if complaints:
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", help='parts of names, like "L=1024" or choice')
    add("--quick", action="store_true", help="a few that take a minute")
    add("--check", action="store_true", help="compare with the counts in the file, write nothing")
    add("--budget", type=float, default=float("inf"), help="seconds after which no case starts")
    add("--repetitions", type=int, default=15, help="of a measurement on a GPU")
    add("--fresh", action="store_true", help="discard earlier results")
    add("--output", type=pathlib.Path, default=PATH, help="the JSON file")
    args = parser.parse_args(argv)
    has_gpu = prepare()
    # They import the package, which makes JAX choose its platform.
    counts = importlib.import_module("._counts", __package__)
    cases = importlib.import_module("._cases", __package__)
    tables = importlib.import_module("benchmarks._gpu_tables")
    every = list(cases.quick_cases() if args.quick else cases.default_cases())
    chosen = chosen_cases(args.cases, every)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / PATH.name if args.check else args.output
        results = counts.Results(path, args.fresh, counts.environment(has_gpu))
        limits = {"repetitions": args.repetitions, "budget": args.budget}
        try:
            counts.run(chosen, results, has_gpu=has_gpu, **limits)
        except KeyboardInterrupt:
            print("stopped: the same call continues where it was")
            raise SystemExit(130) from None
    print(f"\n{tables.table(results.content)}\n")
    if args.check:
        check(args.output, results.content, counts.grown)


if __name__ == "__main__":
    main()
