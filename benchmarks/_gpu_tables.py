"""The tables of `benchmarks gpu`, and what its plot shows."""

import itertools
import json
import pathlib
import textwrap
from typing import Any

from ._cases import NO_KERNELS
from ._gpu_cases import CHOICE, KINDS, SCAN
from ._measure import markdown

TITLES = dict(zip(KINDS, ("Forward", "Forward and gradient"), strict=True))
NOT_MEASURED = "Not measured on a GPU: all times are predicted from the counts."
# What a table calls a cell whose name here does not say what it is.
CELLS = {"GRU, forgets": "GRU, untrained, recurrent weights halved"}
# What the page about accelerators shows of the counts: by program, what it is called there.
PAGE_CELLS, PAGE_LENGTH = ("DiagonalGRU", "GRU, forgets"), 65_536
_PAGE = {SCAN: "`lax.scan`", f"{CHOICE}{NO_KERNELS}": "chosen, kernels off", CHOICE: "chosen"}

Content = dict[str, Any]


def shown(cell: str) -> str:
    return CELLS.get(cell, cell)


def _scans(content: Content, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The figures of the scan by problem."""
    records = content["cases"].values()
    return {_problem(r): r[kind] for r in records if r["solver"] == SCAN and kind in r}


def _problem(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["cell"], record["size"], record["length"]


def _ratio(scan: dict[str, Any] | None, row: dict[str, Any], seconds: str) -> str:
    """How many times the scan takes as long."""
    ours, theirs = (_median(found, seconds) for found in (row, scan or {}))
    return "" if ours is None or theirs is None else figures(theirs / ours)


def _median(row: dict[str, Any], seconds: str) -> float | None:
    value = row.get(seconds)
    return value[0] if isinstance(value, (list, tuple)) else value


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def figures(value: float | None, factor: float = 1.0) -> str:
    """Three of them."""
    if value is None:
        return "?"
    return f"{factor * value:,.0f}" if factor * value >= 100 else f"{factor * value:.3g}"


def _loops(loops: dict[str, int | None]) -> str:
    """`attempts 1, iterations 4`: the turns by the names that solvers give."""
    return ", ".join(
        f"{_short(place)} {_number(turned)}" for place, turned in loops.items() if turned != 0
    )


def _short(place: str) -> str:
    name = place.removesuffix("/while").split("/")[-1].removeprefix("pararnn_")
    return f"{name} of the derivative" if "transpose" in place else name


def _line(record: dict[str, Any], row: dict[str, Any], scan: Any, measured: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"cell": shown(record["cell"]), "units": record["size"]}
    line["L"], line["solver"] = f"{record['length']:,}", record["solver"]
    count = record.get("iterations", "")
    line["iterations"] = f"({count})" if record.get("fallback") else count
    # The scan has nothing to observe.
    observed = record["observed"] if row.get("loops") else None
    if "error" in row:
        return line | {"device ops": "failed"}
    line["device ops"] = _number(row["device_ops"])
    line["submissions"] = _number(row["submissions"])
    line["waits"] = _number(row["reads"])
    line["turns"] = _loops(row["loops"]) + (f" (at L = {observed:,})" if observed else "")
    line["temporary / MB"] = figures(row["temporary_bytes"], 1e-6)
    line["moved / MB"] = figures(row["moved_bytes"], 1e-6)
    line["registers"] = _number(row["registers"])
    line["spilled / bytes"] = _number(row["spilled_bytes"])
    line["compile / s"] = figures(row["compile_seconds"])
    line["predicted / ms"] = figures(row["predicted_seconds"], 1e3)
    line["scan / this, predicted"] = _ratio(scan, row, "predicted_seconds")
    if measured:
        line["measured / ms"] = figures(_median(row, "seconds"), 1e3)
        line["scan / this, measured"] = _ratio(scan, row, "seconds")
    return line


def table(content: Content) -> str:
    """One table per kind; prediction beside measurement where there is one."""
    measured = content["environment"]["measured"]
    parts = [] if measured else [NOT_MEASURED]
    for kind, title in TITLES.items():
        scans = _scans(content, kind)
        lines = [
            _line(record, record[kind], scans.get(_problem(record)), measured)
            for record in content["cases"].values()
            if kind in record
        ]
        if lines:
            parts.append(f"{title}:\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def block(folder: pathlib.Path) -> str:
    """What stands in the README, with what it was counted by."""
    content = load(folder)
    if content is None:
        return "Not counted."
    made = content["environment"]
    about = f"`python -m benchmarks gpu`, for {made['chip']}, JAX {made['jax']}, {made['date']}."
    return f"{about} {table(content)}"


def page(folder: pathlib.Path) -> str:
    """What stands in the page about accelerators: forward and gradient of one long sequence."""
    content = load(folder)
    assert content is not None
    lines = []
    for cell, (solver, program) in itertools.product(PAGE_CELLS, _PAGE.items()):
        row = next(
            record["gradient"]
            for record in content["cases"].values()
            if (record["cell"], record["length"], record["solver"]) == (cell, PAGE_LENGTH, solver)
        )
        line: dict[str, Any] = {"cell": shown(cell), "program": program}
        line["device ops"], line["submissions"] = map(
            _number, (row["device_ops"], row["submissions"])
        )
        line["temporary / MB"] = figures(row["temporary_bytes"], 1e-6)
        line["predicted / ms"] = figures(row["predicted_seconds"], 1e3)
        lines.append(line)
    return markdown(lines)


def load(folder: pathlib.Path) -> Content | None:
    path = folder / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def panels(content: Content) -> dict[str, dict[str, list[tuple[Any, float]]]]:
    """By kind and solver, the predicted milliseconds by problem; the scan comes first."""
    found: dict[str, dict[str, list[tuple[Any, float]]]] = {}
    records = sorted(content["cases"].values(), key=lambda record: record["solver"] != SCAN)
    for kind, title in TITLES.items():
        for record in records:
            seconds = record.get(kind, {}).get("predicted_seconds")
            if seconds is not None:
                where = f"{textwrap.fill(shown(record['cell']), 13)}\nL = {record['length']:,}"
                solvers = found.setdefault(title, {})
                solvers.setdefault(record["solver"], []).append((where, 1e3 * seconds))
    return found
