"""`python -m benchmarks NAME [options]`; `--help` after a name lists its options."""

import importlib
import sys

NAMES = {
    "speed": "time, compile time and memory of the solvers against `lax.scan`, to a JSON file",
    "report": "renew the tables of the README files, and the plots, from the JSON files",
    "counts": "operations, bytes, iterations and memory of a solve, counted without a clock",
    "sharded": "one sequence on several devices: speed, errors, memory, traffic",
    "agreement": "errors of values and gradients against `lax.scan`",
    "cells": "every cell: structure, iterations before and after training, agreement",
    "convergence": "iterations of each method on systems from forgetful to chaotic",
    "random_systems": "whether a wrong answer is ever silent, on random and hostile systems",
    "trained": "iterations and errors on trained networks",
    "state_tracking": "which solvers are parallel for networks that track a state",
}


def main() -> None:
    name, *options = sys.argv[1:] or ["--help"]
    if name in NAMES:
        importlib.import_module(f".{name}", __package__).main(options)
        return
    lines = [
        "usage: python -m benchmarks NAME [options]; NAME --help lists the options",
        "",
        *(f"  {name:<15} {text}" for name, text in NAMES.items()),
    ]
    if name in ("-h", "--help"):
        print("\n".join(lines))
        return
    print("\n".join([f"error: unknown benchmark {name!r}", *lines]), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
