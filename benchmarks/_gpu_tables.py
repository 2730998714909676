"""The tables of what a GPU would run (`gpu.json`) and of what it took (`h200.json`)."""

import itertools
import textwrap
from typing import Any

from ._measure import Row, date_of, markdown
from ._solvers import CHOICE, NO_KERNELS, SCAN

KINDS = {"forward": "forward", "gradient": "forward + gradient"}
NOT_MEASURED = "Not measured on a GPU: all times are predicted from the counts."
# The cases of the pages: one long sequence of two cells.
_PAGE_CELLS, _PAGE_LENGTH = ("DiagonalGRU", "GRU, forgets"), 65_536

Content = dict[str, Any]


def shown(cell: str) -> str:
    """The name of a cell in tables."""
    names = {"GRU, forgets": "GRU, untrained, recurrent weights halved"}
    return names.get(cell, cell)


def figures(value: float | None, factor: float = 1.0) -> str:
    """Three significant digits; `?` for an unknown value."""
    if value is None:
        return "?"
    return f"{factor * value:,.0f}" if factor * value >= 100 else f"{factor * value:.3g}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _find(records: Any, **wanted: Any) -> Row:
    return next(r for r in records if wanted.items() <= r.items())


# --- counts -----------------------------------------------------------------------------------


def table(content: Content) -> str:
    """One table per kind; prediction beside measurement where there is one."""
    parts = [] if content["environment"]["measured"] else [NOT_MEASURED]
    records = content["cases"].values()
    for kind, title in (("forward", "Forward"), ("gradient", "Forward and gradient")):
        scans = {_problem(r): r[kind] for r in records if r["solver"] == SCAN and kind in r}
        lines = [_counted(r, r[kind], scans.get(_problem(r))) for r in records if kind in r]
        if lines:
            parts.append(f"{title}:\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def _problem(record: Row) -> tuple[Any, ...]:
    return record["cell"], record["size"], record["length"]


def _counted(record: Row, row: Row, scan: Row | None) -> Row:
    count = record.get("iterations", "")
    line: Row = {
        "cell": shown(record["cell"]),
        "units": record["size"],
        "L": f"{record['length']:,}",
        "solver": record["solver"],
        "iterations": f"({count})" if record.get("fallback") else count,
    }
    if "error" in row:
        return line | {"device ops": "failed"}
    observed = record["observed"] if row["loops"] else None
    line |= {
        "device ops": _number(row["device_ops"]),
        "submissions": _number(row["submissions"]),
        "waits": _number(row["reads"]),
        "turns": _loops(row["loops"]) + (f" (at L = {observed:,})" if observed else ""),
        "temporary / MB": figures(row["temporary_bytes"], 1e-6),
        "moved / MB": figures(row["moved_bytes"], 1e-6),
        "registers": _number(row["registers"]),
        "spilled / bytes": _number(row["spilled_bytes"]),
        "compile / s": figures(row["compile_seconds"]),
        "predicted / ms": figures(row["predicted_seconds"], 1e3),
        "scan / this, predicted": _ratio(scan, row, "predicted_seconds"),
    }
    if "seconds" in row:
        line["measured / ms"] = figures(row["seconds"][0], 1e3)
        line["scan / this, measured"] = _ratio(scan, row, "seconds")
    return line


def _ratio(scan: Row | None, row: Row, key: str) -> str:
    """How many times longer the scan takes; empty if unknown."""
    values = [found.get(key) for found in (row, scan or {})]
    ours, theirs = (v[0] if isinstance(v, (list, tuple)) else v for v in values)
    return "" if ours is None or theirs is None else figures(theirs / ours)


def _loops(loops: dict[str, int | None]) -> str:
    """The trips by the package's named scopes: `rest 1, iterations 4`."""
    parts = []
    for scope, trips in loops.items():
        name = scope.removesuffix("/while").split("/")[-1].removeprefix("pararnn_")
        name += " of the derivative" * ("transpose" in scope)
        parts += [f"{name} {_number(trips)}"] * (trips != 0)
    return ", ".join(parts)


def counted(content: Content) -> str:
    made = content["environment"]
    about = f"`make gpu-check`, for {made['chip']}, JAX {made['jax']}, {date_of(content, 'cases')}."
    return f"{about} {table(content)}"


def page_counted(content: Content) -> str:
    """Forward and gradient of one long sequence."""
    programs = {SCAN: "`lax.scan`", CHOICE + NO_KERNELS: "chosen, kernels off", CHOICE: "chosen"}
    lines = []
    for cell, (solver, program) in itertools.product(_PAGE_CELLS, programs.items()):
        cases = content["cases"].values()
        row = _find(cases, cell=cell, length=_PAGE_LENGTH, solver=solver)["gradient"]
        lines.append(
            {
                "cell": shown(cell),
                "program": program,
                "device ops": _number(row["device_ops"]),
                "submissions": _number(row["submissions"]),
                "temporary / MB": figures(row["temporary_bytes"], 1e-6),
                "predicted / ms": figures(row["predicted_seconds"], 1e3),
            }
        )
    return markdown(lines)


def panels(content: Content) -> dict[str, dict[str, list[tuple[Any, ...]]]]:
    """By kind and solver, the predicted milliseconds by problem; the scan comes first."""
    found: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
    records = sorted(content["cases"].values(), key=lambda record: record["solver"] != SCAN)
    for kind, record in itertools.product(KINDS, records):
        seconds = record.get(kind, {}).get("predicted_seconds")
        if seconds is not None:
            where = f"{textwrap.fill(shown(record['cell']), 13)}\nL = {record['length']:,}"
            series = found.setdefault(KINDS[kind], {}).setdefault(record["solver"], [])
            series.append((where, 1e3 * seconds))
    return found


# --- measurements -----------------------------------------------------------------------------


def _predicted(content: Content, record: Row) -> float | None:
    key = f"{record['cell']} D={record['size']} L={record['length']} {record['solver']}"
    counted = content["cases"].get(key, {}) if record["batch"] == 1 else {}
    return counted.get(record["kind"], {}).get("predicted_seconds")


def _times(seconds: list[float]) -> str:
    median, lower, upper = (figures(s, 1e3) for s in seconds)
    return f"{median} ({lower}–{upper})"


def measured(content: Content, counts: Content) -> str:
    keys = "cell", "size", "length", "batch", "measured", "kind"
    scans = {tuple(r[k] for k in keys): r for r in content["programs"] if r["solver"] == SCAN}
    lines = []
    for record in content["programs"]:
        scan, predicted = scans.get(tuple(record[k] for k in keys)), _predicted(counts, record)

        def column(key, factor=1.0, record=record):
            return figures(record[key], factor) if key in record else ""

        solver = record["solver"]
        lines.append(
            {
                "cell": shown(record["cell"]),
                "units": record["size"],
                "L": f"{record['length']:,}",
                "batch": record["batch"],
                "program": f"{record['measured']}, {record['kind']}",
                "solver": "chosen for a GPU" if solver == CHOICE else solver,
                "a call / ms": _times(record["seconds"]),
                "in a row / ms": column("in_a_row_seconds", 1e3),
                "on the device / ms": column("device_seconds", 1e3),
                "device ops": record.get("device_operations", ""),
                "predicted / ms": "" if predicted is None else figures(predicted, 1e3),
                "scan / this": _ratio(scan, record, "seconds"),
                "temporary / MB": column("temporary_bytes", 1e-6),
                "compile / s": column("compile_seconds"),
            }
        )
    made, copies = content["environment"], content["copy_bytes_per_second"][0]
    return (
        f"{made['device']}, driver {made['driver']}, JAX {made['jax']}, {made['date']}; a copy of "
        f"a gigabyte runs at {copies / 1e12:.1f} TB/s.\n\n{markdown(lines)}"
    )


def _long(content: Content, cell: str, solver: str, kind: str) -> Row:
    wanted = {"cell": cell, "length": _PAGE_LENGTH, "batch": 1, "solver": solver, "kind": kind}
    return _find(content["programs"], **wanted)


def page_measured(content: Content, counts: Content) -> str:
    """One long sequence, with kernels."""
    titles = {"forward": "states", "gradient": "states and gradient"}
    lines = []
    for cell, kind in itertools.product(_PAGE_CELLS, titles):
        ours, scan, one = (_long(content, cell, s, kind) for s in (CHOICE, SCAN, "Sequential"))
        lines.append(
            {
                "cell": shown(cell),
                "what": titles[kind],
                "chosen / ms": _times(ours["seconds"]),
                "`lax.scan` / ms": figures(scan["seconds"][0], 1e3),
                "`Sequential()`, one kernel / ms": figures(one["seconds"][0], 1e3),
                "predicted / ms": figures(_predicted(counts, ours), 1e3),
            }
        )
    return markdown(lines)


def headline(content: Content, speed: Content) -> str:
    """The table of the project's README: one sequence of 65,536 steps, against the scan."""
    found = []
    for cell in ("DiagonalGRU", "GRU"):
        cases = speed["cases"].values()
        record = _find(cases, cell=cell, length=_PAGE_LENGTH, batch=1, size=32)
        scan, ours = record["rows"][:2]
        found.append(("2 CPU cores", f"{cell}, 32 units", lambda k, s=scan, o=ours: (s[k], o[k])))
    for cell in _PAGE_CELLS:

        def pair(kind, cell=cell):
            return tuple(_long(content, cell, solver, kind) for solver in (SCAN, CHOICE))

        found.append((content["environment"]["device"], f"{shown(cell)}, 64 units", pair))
    lines = []
    for machine, cell, pair in found:
        line = {"machine": machine, "cell": cell}
        for kind, title in KINDS.items():
            scan, ours = (row["seconds"][0] for row in pair(kind))
            text = f"{figures(scan, 1e3)} → {figures(ours, 1e3)} ({figures(scan / ours)}×)"
            line[f"{title} / ms: scan → ours"] = text
        lines.append(line)
    return markdown(lines)
