"""The tables of the pages, and the plots of `benchmarks/results`, from the JSON files there and in
`examples/results`.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a test keeps it up to date.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from examples import _tracking, compare_cells

from . import _gpu_tables, _plots, _tables, random_systems
from ._measure import RESULTS, date_of

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "results"
# The tables of each file.
FILES = {
    "README.md": ("headline",),
    "docs/accelerators.md": ("accelerators-counted", "accelerators-measured"),
    "docs/cells.md": ("cells",),
    "docs/examples.md": ("tracking", "compare-cells"),
    "docs/several_devices.md": ("sharded-speed",),
    "docs/speed.md": ("speed", "targets", "batches"),
    "docs/trained_networks.md": ("trained-gates", "trained-sweeps", "trained-hard"),
    "benchmarks/README.md": (
        "agreement",
        "cells-agreement",
        "convergence",
        "solvers",
        "random-systems",
        "state-tracking",
        "trained",
        "gpu",
        "gpu-measured",
        "sharded-agreement",
        "sharded-long",
        "sharded-traffic",
    ),
}
# The tables that name the command, the machine and the date before them: by name, the file,
# the part of which the date is, and the function.
_TABLES: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "agreement": ("agreement", "errors", _tables.agreement),
    "cells": ("cells", "cells", _tables.cells),
    "cells-agreement": ("cells", "agreement", _tables.cells_agreement),
    "convergence": ("convergence", "systems", _tables.convergence),
    "solvers": ("convergence", "damping", _tables.solvers),
    "random-systems": ("random_systems", "groups", random_systems.table),
    "state-tracking": ("state_tracking", "solving", _tables.state_tracking),
    "trained": ("trained", "short", _tables.trained),
    "trained-gates": ("trained", "gates", _tables.trained_gates),
    "trained-sweeps": ("trained", "sweeps", _tables.trained_sweeps),
    "trained-hard": ("trained", "sweeps", _tables.trained_hard),
    "sharded-speed": ("sharded", "speed", _tables.sharded_speed),
    "sharded-agreement": ("sharded", "agreement", _tables.sharded_agreement),
    "sharded-long": ("sharded", "long", _tables.sharded_long),
    "sharded-traffic": ("sharded", "traffic", _tables.sharded_traffic),
}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def tables() -> dict[str, str]:
    """The text between the markers of each name."""
    blocks = {}
    for name, (file, part, table) in _TABLES.items():
        content = load(file)
        made = content["environment"]
        cores = f", {made['cores']} cores" * (file == "sharded")
        about = f"`python -m benchmarks {file}`, {made['device']}{cores}, JAX {made['jax']}"
        blocks[name] = f"{about}, {date_of(content, part)}.\n\n{table(content)}"
    speed, counts, h200 = load("speed-cpu"), load("gpu"), load("h200")
    return blocks | {
        "speed": f"{_tables.speed(speed)}\n\nThis command was not run on a GPU.",
        "targets": _tables.targets(speed),
        "batches": _tables.batches(speed),
        "tracking": _tracking.block(EXAMPLES / "tracking.json"),
        "compare-cells": compare_cells.block(EXAMPLES / "cells.json"),
        "accelerators-counted": _gpu_tables.page_counted(counts),
        "accelerators-measured": _gpu_tables.page_measured(h200, counts),
        "gpu": _gpu_tables.counted(counts),
        "gpu-measured": _gpu_tables.measured(h200, counts),
        "headline": _gpu_tables.headline(h200, speed),
    }


def rewritten(text: str, blocks: dict[str, str]) -> str:
    """A Markdown text with each block between its markers; raises if a marker is missing."""
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"`text` must have {begin} and {end} once each.")
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        text = pattern.sub(lambda _, b=block: f"{begin}\n{b}\n{end}", text)  # noqa: B023
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    blocks = tables()
    written = [ROOT / file for file in FILES]
    for path, names in zip(written, FILES.values(), strict=True):
        path.write_text(rewritten(path.read_text(), {name: blocks[name] for name in names}))
    plots = _plots.draw(load("speed-cpu"), load("convergence"), load("gpu"), RESULTS)
    for path in (*written, *plots):
        print(f"written: {path}")
