"""The table of what was measured on a GPU, beside what was predicted for it."""

import itertools
import json
import pathlib
from typing import Any

from ._gpu_cases import SCAN
from ._gpu_tables import PAGE_CELLS, PAGE_LENGTH, figures, load, shown
from ._measure import markdown

Record = dict[str, Any]
_KINDS = {"forward": "forward", "gradient": "forward + gradient"}
_NAMES = {"choice": "chosen for a GPU"}


def block(folder: pathlib.Path) -> str:
    """What stands in the README, with what it was measured by."""
    path = folder / "h200.json"
    if not path.exists():
        return "Not measured."
    content = json.loads(path.read_text())
    made, counted = content["environment"], load(folder)
    predicted = {} if counted is None else counted["cases"]
    scans = {_problem(r): r for r in content["programs"] if r["solver"] == SCAN}
    lines = [_line(r, scans.get(_problem(r)), predicted) for r in content["programs"]]
    about = (
        f"{made['device']}, driver {made['driver']}, JAX {made['jax']}, {made['date']}; a copy of "
        f"a gigabyte runs at {content['copy_bytes_per_second'][0] / 1e12:.1f} TB/s."
    )
    return f"{about}\n\n{markdown(lines)}"


def _problem(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("cell", "size", "length", "batch", "measured", "kind"))


def _line(record: Record, scan: Record | None, predicted: dict[str, Any]) -> dict[str, Any]:
    key = f"{record['cell']} D={record['size']} L={record['length']} {record['solver']}"
    counted = predicted.get(key, {}) if record["batch"] == 1 else {}
    seconds = counted.get(record["kind"], {}).get("predicted_seconds")
    median, lower, upper = (figures(s, 1e3) for s in record["seconds"])
    in_a_row, on_device = record.get("in_a_row_seconds"), record.get("device_seconds")
    return {
        "cell": shown(record["cell"]),
        "units": record["size"],
        "L": f"{record['length']:,}",
        "batch": record["batch"],
        "program": f"{record['measured']}, {record['kind']}",
        "solver": _NAMES.get(record["solver"], record["solver"]),
        "a call / ms": f"{median} ({lower}–{upper})",
        "in a row / ms": "" if in_a_row is None else figures(in_a_row, 1e3),
        "on the device / ms": "" if on_device is None else figures(on_device, 1e3),
        "device ops": record.get("device_operations", ""),
        "predicted / ms": "" if seconds is None else figures(seconds, 1e3),
        "scan / this": "" if scan is None else figures(scan["seconds"][0] / record["seconds"][0]),
        "temporary / MB": figures(record["temporary_bytes"], 1e-6)
        if "temporary_bytes" in record
        else "",
        "compile / s": figures(record["compile_seconds"]) if "compile_seconds" in record else "",
    }


def page(folder: pathlib.Path) -> str:
    """What stands in the page about accelerators: one long sequence, with kernels."""
    content, counted = json.loads((folder / "h200.json").read_text()), load(folder)
    assert counted is not None
    lines = []
    for cell, kind in itertools.product(PAGE_CELLS, _KINDS):
        found = {
            r["solver"]: r["seconds"]
            for r in content["programs"]
            if (r["cell"], r["length"], r["batch"], r["kind"]) == (cell, PAGE_LENGTH, 1, kind)
        }
        median, lower, upper = (figures(s, 1e3) for s in found["choice"])
        (predicted,) = (
            r[kind]["predicted_seconds"]
            for r in counted["cases"].values()
            if (r["cell"], r["length"], r["solver"]) == (cell, PAGE_LENGTH, "choice")
        )
        lines.append(
            {
                "cell": shown(cell),
                "what": {"forward": "states", "gradient": "states and gradient"}[kind],
                "chosen / ms": f"{median} ({lower}–{upper})",
                "`lax.scan` / ms": figures(found[SCAN][0], 1e3),
                "`Sequential()`, one kernel / ms": figures(found["Sequential"][0], 1e3),
                "predicted / ms": figures(predicted, 1e3),
            }
        )
    return markdown(lines)


def headline(folder: pathlib.Path, speed: Record) -> str:
    """The table of the project's README: one sequence of 65,536 steps, against the scan."""
    content = json.loads((folder / "h200.json").read_text())
    length, lines = 65_536, []
    for cell in ("DiagonalGRU", "GRU"):
        found = (r for r in speed["cases"].values() if (r["cell"], r["length"]) == (cell, length))
        scan, ours = next(r for r in found if r["batch"] == 1 and r["size"] == 32)["rows"][:2]
        pairs = {k: (scan[k]["seconds"][0], ours[k]["seconds"][0]) for k in _KINDS}
        lines.append(_pairs("2 CPU cores", f"{cell}, 32 units", pairs))
    for cell in ("DiagonalGRU", "DiagonalLSTM", "GRU, forgets"):
        seconds = {
            (r["solver"], r["kind"]): r["seconds"][0]
            for r in content["programs"]
            if (r["cell"], r["length"], r["batch"]) == (cell, length, 1)
        }
        if all(("choice", kind) in seconds for kind in _KINDS):
            pairs = {k: (seconds[SCAN, k], seconds["choice", k]) for k in _KINDS}
            name = f"{shown(cell)}, 64 units"
            lines.append(_pairs(content["environment"]["device"], name, pairs))
    return markdown(lines)


def _pairs(machine: str, what: str, pairs: dict[str, tuple[float, float]]) -> dict[str, Any]:
    line = {"machine": machine, "cell": what}
    for kind, (scan, ours) in pairs.items():
        shown = f"{figures(scan, 1e3)} → {figures(ours, 1e3)}"
        line[f"{_KINDS[kind]} / ms: scan → ours"] = f"{shown} ({figures(scan / ours)}×)"
    return line
