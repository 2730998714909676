"""The tables of two README files and of pages of the documentation, and the plots of
`benchmarks/results`, from the JSON files there and in `examples/results`.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a test keeps it up to date.
"""

import argparse
import itertools
import json
import pathlib
import re
from typing import Any

from examples import _tracking, compare_cells
from pararnn.diagnostics import Spread

from . import _gpu_measured, _gpu_tables, _plots, _sharded_tables, _summaries
from ._measure import markdown
from .speed import GAINS

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples" / "results"
PLATFORMS = ("cpu", "gpu")
# The tables of each file.
FILES = {
    "README.md": ("headline",),
    "docs/accelerators.md": ("accelerators-counted", "accelerators-measured"),
    "docs/cells.md": ("cells",),
    "docs/examples.md": ("tracking", "compare-cells"),
    "docs/several_devices.md": ("sharded-speed",),
    "docs/speed.md": ("speed", "targets", "batches"),
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
        "sharded-model",
    ),
}
# Where forward and gradient together are to be 1.5 times as fast as the scan's, on a CPU.
FASTER = {"Elman", "GRU", "DiagonalGRU", "DiagonalLSTM"}
SHORTEST = 4096  # the goals are for this length or more
# Where forward and gradient together are to take at most this part of the scan's time, on a CPU.
BATCHES = {"cells": ("GRU", "DiagonalGRU"), "sizes": (32, 128), "batches": (1, 8, 64)}
NO_SLOWER = 1.05

Record = dict[str, Any]


def load(folder: pathlib.Path, platform: str) -> dict[str, Any] | None:
    """The results of `benchmarks speed`, if there are any."""
    path = folder / f"speed-{platform}.json"
    return json.loads(path.read_text()) if path.exists() else None


def select(content: dict[str, Any], **wanted: Any) -> list[Record]:
    """The timed cases whose fields have these values, by length."""
    timed = [r for r in content["cases"].values() if "floor_bytes" in r]
    found = [r for r in timed if all(r[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda record: record["length"])


def _row(record: Record, name: str) -> dict[str, Any] | None:
    return next((row for row in record["rows"] if row["name"] == name), None)


def _defaults(content, **wanted) -> list[tuple[Record, dict[str, Any], dict[str, Any]]]:
    """`(record, scan's row, default solver's row)` of single sequences, the recurrence alone."""
    wanted = {"batch": 1, "project": False, "dtype": "float32", **wanted}
    pairs = [(r, r["rows"][0], _row(r, "default")) for r in select(content, **wanted)]
    return [(r, scan, row) for r, scan, row in pairs if row is not None]


# --- tables -----------------------------------------------------------------------------------


def speed_table(content: dict[str, Any]) -> str:
    """The default solver against the scan: times of cells over lengths."""
    rows = []
    for record, _, row in _defaults(content, question="default against lax.scan"):
        if record["cell"] not in FASTER or "gradient" not in row:
            continue
        line: dict[str, Any] = {"cell": record["cell"], "L": f"{record['length']:,}"}
        line["units"] = record["size"]
        for kind, title in _plots.KINDS.items():
            line[f"{title} / ms"] = 1e3 * row[kind]["seconds"][0]
            line[f"{title} / scan"] = Spread(*row[kind]["ratio"])
        rows.append(line)
    return markdown(sorted(rows, key=lambda line: line["cell"]))


def targets_table(content: dict[str, Any]) -> str:
    """The worst over the lengths of each ratio that has a goal; misses in bold."""
    cells = dict.fromkeys(record["cell"] for record, _, _ in _defaults(content, size=32))
    rows = []
    for cell in cells:
        found = [
            (scan, row)
            for record, scan, row in _defaults(content, cell=cell, size=32)
            if "gradient" in row and record["length"] >= SHORTEST
        ]
        if not found:
            continue
        faster = 1 / 1.5 if cell in FASTER else 1.1
        line: dict[str, Any] = {"cell": cell}
        for kind, title in _plots.KINDS.items():
            goal = 1.1 if kind == "forward" else faster
            worst = max((Spread(*row[kind]["ratio"]) for _, row in found), key=lambda s: s.median)
            line[f"{title}: time"] = _marked(str(worst), worst.median, goal)
        for kind, title in _plots.KINDS.items():
            worst = max(
                row[kind]["compile_seconds"] / scan[kind]["compile_seconds"] for scan, row in found
            )
            line[f"{title}: compile"] = _marked(f"{worst:.2f}", worst, 3)
        bytes_ = [
            (row["gradient"]["temporary_bytes"], scan["gradient"]["temporary_bytes"])
            for scan, row in found
        ]
        worst = max(ours / max(theirs, 1) for ours, theirs in bytes_)
        line["forward + gradient: memory"] = _marked(f"{worst:.2f}", worst, 1)
        rows.append(line)
    return markdown(rows)


def batches_table(content: dict[str, Any]) -> str:
    """Forward and gradient of many sequences against the scan, and the memory; misses in bold."""
    rows = []
    for cell, size in itertools.product(BATCHES["cells"], BATCHES["sizes"]):
        found = [
            (record["length"], record["batch"], scan["gradient"], row["gradient"])
            for batch in BATCHES["batches"]
            for record, scan, row in _defaults(content, cell=cell, size=size, batch=batch)
            if "gradient" in row
        ]
        several = {length for length, batch, *_ in found if batch > 1}
        for length in sorted(several):
            line: dict[str, Any] = {"cell": cell, "units": size, "L": f"{length:,}"}
            line |= {f"B = {batch}": "" for batch in BATCHES["batches"]}
            line |= {f"memory, B = {batch}": "" for batch in BATCHES["batches"]}
            for other, batch, scan, ours in found:
                if other == length:
                    time = Spread(*ours["ratio"])
                    line[f"B = {batch}"] = _marked(str(time), time.median, NO_SLOWER)
                    memory = ours["temporary_bytes"] / max(scan["temporary_bytes"], 1)
                    line[f"memory, B = {batch}"] = _marked(f"{memory:.2f}", memory, 1)
            rows.append(line)
    return markdown(rows) if rows else "Not measured."


def _marked(text: str, value: float, goal: float) -> str:
    """In bold if the goal, an upper bound, is missed by more than half of the last digit shown."""
    return f"**{text}**" if value > goal + 0.005 else text


def goals_table(content: dict[str, Any]) -> str:
    """What a GPU is to reach, and the best that was measured; misses in bold."""
    rows = []
    for cell, size, goal in (("DiagonalGRU", None, 665), ("GRU", 64, 100)):
        wanted = {"cell": cell} | ({"size": size} if size else {})
        found = [
            (1 / row["forward"]["ratio"][0], record)
            for record, _, row in _defaults(content, **wanted)
            if record["length"] <= 65_536
        ]
        if found:
            best, record = max(found, key=lambda pair: pair[0])
            rows.append(
                {
                    "goal": f"{cell}, forward: {goal}× as fast as the scan at some L ≤ 65,536",
                    "measured": _marked(f"{best:.3g}×", goal, best),
                    "at": f"L = {record['length']:,}, {record['size']} units",
                }
            )
    for record in select(content, cell="DiagonalGRU"):
        if record["length"] * record["batch"] * record["size"] < 64e6:
            continue
        floor = record["floor_bytes"]["forward"] / content["copy"]["bytes_per_second"][0]
        row = min(record["rows"][1:], key=lambda row: row["forward"]["seconds"][0])
        times = row["forward"]["seconds"][0] / floor
        rows.append(
            {
                "goal": "DiagonalGRU, forward: at most 4 times the memory floor",
                "measured": _marked(f"{times:.2g}", times, 4),
                "at": f"L = {record['length']:,}, batch {record['batch']}, "
                f"{record['size']} units, {row['name']}",
            }
        )
    return markdown(rows) if rows else "No goal was measured."


def _environment(content: dict[str, Any]) -> str:
    found, cases = content["environment"], content["cases"].values()
    dates = sorted({record["date"] for record in cases})
    loads = [record["load"] for record in cases if "load" in record]
    busy = " The machine was busy with other work: the spread is wide." * (
        min(loads) > found["cores"]
    )
    return (
        f"{found['device']} ({found['processor']}, {found['cores']} cores; load average "
        f"{min(loads):.1f} to {max(loads):.1f} while measuring), JAX {found['jax']}, "
        f"{dates[0] if dates[0] == dates[-1] else f'{dates[0]} to {dates[-1]}'}; copies run at "
        f"{content['copy']['bytes_per_second'][0] / 1e9:.3g} GB/s.{busy}"
    )


def tables(folder: pathlib.Path) -> dict[str, str]:
    """What stands between the markers of each name."""
    parts, goals = [], []
    blocks = {"batches": "Not measured."}
    for platform in PLATFORMS:
        content = load(folder, platform)
        if content is None:
            parts.append(f"This command was not run on a {platform.upper()}.")
            continue
        parts += [_environment(content), speed_table(content)]
        goals.append(targets_table(content) if platform == "cpu" else goals_table(content))
        if platform == "cpu":
            blocks["batches"] = batches_table(content)
    blocks |= {"speed": "\n\n".join(parts), "targets": "\n\n".join(goals)}
    blocks |= _summaries.tables(folder) | _sharded_tables.blocks(folder)
    blocks["tracking"] = _tracking.block(EXAMPLES / "tracking.json")
    blocks["compare-cells"] = compare_cells.block(EXAMPLES / "cells.json")
    return blocks | {
        "accelerators-counted": _gpu_tables.page(folder),
        "accelerators-measured": _gpu_measured.page(folder),
        "gpu": _gpu_tables.block(folder),
        "gpu-measured": _gpu_measured.block(folder),
        "headline": _gpu_measured.headline(folder, load(folder, "cpu") or {"cases": {}}),
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


# --- plots ------------------------------------------------------------------------------------


def _time_panels(content: dict[str, Any], size: int) -> dict[Any, Any]:
    """Times as the ratio to the scan times one scan's time, so that all lines share a baseline."""
    panels: dict[Any, Any] = {}
    for cell in ("GRU", "DiagonalGRU"):
        for kind in _plots.KINDS:
            seconds: dict[str, Any] = {"lax.scan": []}
            ratios: dict[str, Any] = {}
            scans: dict[int, float] = {}
            for record in select(
                content, cell=cell, batch=1, size=size, project=False, dtype="float32"
            ):
                length = record["length"]
                for row in record["rows"]:
                    if kind not in row:
                        continue
                    if row["name"] == "lax.scan":
                        if length not in scans:
                            scans[length] = 1e3 * row[kind]["seconds"][0]
                            seconds["lax.scan"].append((length, scans[length]))
                        continue
                    if any(length == old for old, *_ in ratios.setdefault(row["name"], [])):
                        continue
                    ratio, _, upper = row[kind]["ratio"]
                    ratios[row["name"]].append((length, ratio, upper))
                    seconds.setdefault(row["name"], []).append((length, ratio * scans[length]))
            if ratios and len(scans) > 1:
                panels[kind, cell] = seconds, ratios
    return panels


def _heat_panels(content: dict[str, Any], size: int) -> dict[str, dict[tuple[int, int], Spread]]:
    panels: dict[str, dict[tuple[int, int], Spread]] = {}
    lengths = {record["length"] for record in select(content, question="batch sizes")}
    for record in select(content, size=size, project=False, dtype="float32"):
        if record["cell"] not in ("GRU", "DiagonalGRU") or record["length"] not in lengths:
            continue
        for kind, title in _plots.KINDS.items():
            row = _row(record, "default")
            if row and kind in row:
                panel = panels.setdefault(f"{record['cell']}, {title}", {})
                place = record["length"], record["batch"] * record["size"]
                median, lower, upper = (1 / x for x in row[kind]["ratio"])
                panel[place] = Spread(median, upper, lower)
    return dict(sorted(panels.items()))


def _memory_panels(content: dict[str, Any], size: int) -> dict[str, Any]:
    panels: dict[str, Any] = {}
    for cell in ("GRU", "DiagonalGRU"):
        series: dict[str, dict[int, float]] = {}
        for record in select(
            content, cell=cell, batch=1, size=size, project=False, dtype="float32"
        ):
            for row in record["rows"]:
                if "gradient" in row:
                    megabytes = row["gradient"]["temporary_bytes"] / 1e6
                    series.setdefault(row["name"], {})[record["length"]] = megabytes
        if series:
            panels[cell] = {name: sorted(points.items()) for name, points in series.items()}
    return panels


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the plots beside the results."""
    written = []

    def path(name):
        written.append(folder / f"{name}.png")
        return written[-1]

    for platform, size in (("cpu", 32), ("gpu", 64)):
        content = load(folder, platform)
        if content is None:
            continue
        device, units = content["environment"]["device"], f"{size} units, float32"
        if panels := _time_panels(content, size):
            title = f"One sequence, {units}, {device} (★: from here on faster than lax.scan)"
            _plots.times(panels, title, path(f"time-{platform}"))
        if panels := _memory_panels(content, size):
            title = f"Forward + gradient of one sequence, {units}, {device}"
            _plots.memory(panels, title, path(f"memory-{platform}"))
        if panels := _heat_panels(content, size):
            title = (
                f"Default solver, {units}, {device} (medians and quartiles; pale: no difference)"
            )
            _plots.heat(panels, title, path(f"speedup-{platform}"))
        if GAINS in content["cases"]:
            _plots.iterations(content["cases"][GAINS], path(f"iterations-{platform}"))
    counted = _gpu_tables.load(folder)
    if counted is not None:
        chip = counted["environment"]["chip"]
        title = f"Predicted from counts, not measured: one sequence, float32, {chip}"
        _plots.predictions(_gpu_tables.panels(counted), title, path("predicted-gpu"))
    sharded = _sharded_tables.load(folder)
    if sharded is not None:
        title = (
            "Predicted from counts and from the time on one core, not measured:\n"
            "forward + gradient of systems that forget within 128 steps, by what joins the devices"
        )
        _plots.scaling(_sharded_tables.curves(sharded), title, path("scaling"))
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="folder of the files")
    args = parser.parse_args(argv)
    blocks = tables(args.results)
    written = [args.root / file for file in FILES]
    for path, names in zip(written, FILES.values(), strict=True):
        path.write_text(rewritten(path.read_text(), {name: blocks[name] for name in names}))
    for path in (*written, *draw(args.results)):
        print(f"written: {path}")
