"""The Markdown tables of the pages, from the result files."""

import itertools
from collections.abc import Iterable
from typing import Any

from ._measure import Row, Spread, markdown
from .speed import DEFAULT

KINDS = {"forward": "forward", "gradient": "forward + gradient"}
# The largest relative errors of values and gradients that agree.
GOALS = {"float32": (1e-5, 1e-4), "float64": (1e-10, 1e-8)}
ERRORS = "value error", "gradient error"
_FINISHED = "finished sequentially"

Content = dict[str, Any]


def _bold(text: str, missed: bool) -> str:
    return f"**{text}**" if missed else text


def _marked(text: str, value: float, goal: float) -> str:
    """In bold if the goal, an upper bound, is missed by more than half of the last digit shown."""
    return _bold(text, value > goal + 0.005)


def _grouped(rows: list[Row], *keys: str) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def _errors(rows: list[Row], dtype: str) -> Row:
    """The largest errors beside their goals."""
    line = {}
    for key, goal in zip(ERRORS, GOALS[dtype], strict=True):
        worst = max(row[key] for row in rows)
        line[f"{key} (goal)"] = f"{_bold(f'{worst:.1e}', worst > goal)} ({goal:.0e})"
    return line


def _solves(rows: list[Row], name: str, solver: str) -> list[Row]:
    """Iterations, critical path and error of each solve."""
    return [
        {
            name: row[name],
            "L": f"{row['L']:,}",
            "solver": f"{row[solver]}, chunks of {row['chunk']}",
            "iterations": row["iterations"],
            "steps": f"{row['steps']:,}",
            _FINISHED: "yes" if row[_FINISHED] else "no",
            "error": f"{row['error']:.1e}",
        }
        for row in rows
    ]


# --- speed ------------------------------------------------------------------------------------

_FASTER = {"Elman", "GRU", "DiagonalGRU", "DiagonalLSTM"}  # forward and gradient: 1.5 times
_SHORTEST = 4096  # the goals are for this length or more


def select(content: Content, **wanted: Any) -> list[tuple[Row, Row, Row]]:
    """`(record, scan's row, default solver's row)` of the recurrence alone in float32, by length;
    of single sequences unless told otherwise."""
    wanted = {"batch": 1, "project": False, "dtype": "float32", **wanted}
    found = []
    for record in content["cases"].values():
        rows = {row["name"]: row for row in record["rows"]}
        if wanted.items() <= record.items() and "default" in rows:
            found.append((record, rows["lax.scan"], rows["default"]))
    return sorted(found, key=lambda one: one[0]["length"])


def speed(content: Content) -> str:
    """The machine; the default solver against the scan, by cell and length."""
    rows = []
    for record, _, row in select(content, question=DEFAULT):
        if record["cell"] not in _FASTER or "gradient" not in row:
            continue
        line: Row = {"cell": record["cell"], "L": f"{record['length']:,}", "units": record["size"]}
        for kind, title in KINDS.items():
            line[f"{title} / ms"] = 1e3 * row[kind]["seconds"][0]
            line[f"{title} / scan"] = Spread(*row[kind]["ratio"])
        rows.append(line)
    made, records = content["environment"], content["cases"].values()
    dates = sorted({record["date"] for record in records})
    loads = [record["load"] for record in records]
    return (
        f"{made['device']} ({made['processor']}, {made['cores']} cores; load average "
        f"{min(loads):.1f} to {max(loads):.1f} while measuring), JAX {made['jax']}, "
        f"{dates[0] if dates[0] == dates[-1] else f'{dates[0]} to {dates[-1]}'}; copies run at "
        f"{content['copy']['bytes_per_second'][0] / 1e9:.3g} GB/s.\n\n"
        f"{markdown(sorted(rows, key=lambda line: line['cell']))}"
    )


def targets(content: Content) -> str:
    """The worst over the lengths of each ratio that has a goal; misses in bold."""
    rows = []
    for cell in dict.fromkeys(record["cell"] for record, *_ in select(content, size=32)):
        found = [
            (scan, row)
            for record, scan, row in select(content, cell=cell, size=32)
            if "gradient" in row and record["length"] >= _SHORTEST
        ]
        if not found:
            continue
        goals = {"forward": 1.1, "gradient": 1 / 1.5 if cell in _FASTER else 1.1}
        line: Row = {"cell": cell}
        for kind, title in KINDS.items():
            worst = max((Spread(*row[kind]["ratio"]) for _, row in found), key=lambda s: s.median)
            line[f"{title}: time"] = _marked(str(worst), worst.median, goals[kind])
        for kind, title in KINDS.items():
            key = "compile_seconds"
            compiled = max(row[kind][key] / scan[kind][key] for scan, row in found)
            line[f"{title}: compile"] = _marked(f"{compiled:.2f}", compiled, 3)
        memory = max(_memory(row, scan) for scan, row in found)
        line["forward + gradient: memory"] = _marked(f"{memory:.2f}", memory, 1)
        rows.append(line)
    return markdown(rows)


def _memory(row: Row, scan: Row) -> float:
    ours, theirs = (r["gradient"]["temporary_bytes"] for r in (row, scan))
    return ours / max(theirs, 1)


def batches(content: Content) -> str:
    """Forward and gradient of many sequences against the scan, and the memory; misses in bold."""
    rows, counts = [], (1, 8, 64)
    for cell, size in itertools.product(("GRU", "DiagonalGRU"), (32, 128)):
        found = {
            (record["length"], batch): (row, scan)
            for batch in counts
            for record, scan, row in select(content, cell=cell, size=size, batch=batch)
            if "gradient" in row
        }
        for length in sorted({length for length, batch in found if batch > 1}):
            line: Row = {"cell": cell, "units": size, "L": f"{length:,}"}
            some = {batch: found[length, batch] for batch in counts if (length, batch) in found}
            for batch, (row, _) in some.items():
                time = Spread(*row["gradient"]["ratio"])
                line[f"B = {batch}"] = _marked(str(time), time.median, 1.05)
            for batch, pair in some.items():
                memory = _memory(*pair)
                line[f"memory, B = {batch}"] = _marked(f"{memory:.2f}", memory, 1)
            rows.append(line)
    return markdown(rows)


# --- correctness and iterations ---------------------------------------------------------------


def agreement(content: Content) -> str:
    """The worst over cells and lengths."""
    lines = []
    for (dtype, solver), rows in _grouped(content["errors"], "dtype", "solver"):
        counts = sorted({row["iterations"] for row in rows})
        text = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        line = {"dtype": dtype, "solver": solver, **_errors(rows, dtype), "iterations": text}
        lines.append(line)
    return markdown(lines)


def cells(content: Content) -> str:
    """Structure and iterations."""
    return markdown(content["cells"])


def cells_agreement(content: Content) -> str:
    """Results of every cell under every solver."""
    lines = []
    for (dtype, weights), rows in _grouped(content["agreement"], "dtype", "weights"):
        right = [row for row in rows if row["successful"]]
        line: Row = {"dtype": dtype, "weights": weights, "solves": len(rows)}
        line["reported as failed"] = len(rows) - len(right)
        line[_FINISHED] = sum(row[_FINISHED] for row in right)
        for key, goal in zip(ERRORS, GOALS[dtype], strict=True):
            worst = max(row[key] for row in right)
            line[f"largest {key}"] = _bold(f"{worst:.1e}", worst > goal)
        lines.append(line)
    (stream,) = content["MinMax over a long stream"]
    return (
        f"{markdown(lines)}\n\nMinMax over {stream['L']:,} steps in one associative scan: relative "
        f"error of values {stream['value error']:.1e}, of gradients "
        f"{stream['gradient error']:.1e}; largest state {stream['largest state']:.3g}."
    )


def convergence(content: Content) -> str:
    """Iterations by system and method; in brackets where chunks were finished sequentially."""
    rows = [row for row in content["systems"] + content["gains"] if row["iterations"] != ""]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for (system, exponent), part in _grouped(rows, "system", "exponent"):
        line: Row = {"system": system, "exponent": f"{exponent:.2f}"} | dict.fromkeys(methods, "")
        for row in part:
            count = row["iterations"]
            line[row["method"]] = f"({count})" if row[_FINISHED] else count
        line["its chunk, steps"] = f"{part[-1]['chunk']}, {part[-1]['steps']:,}"
        lines.append(line)
    return markdown(lines)


def solvers(content: Content) -> str:
    """Adaptive damping against constants; time to compile."""
    adaptive, *constants = content["damping"]
    finished = [row for row in constants if not row[_FINISHED]]
    best = min(finished, key=lambda row: row["iterations"])
    return (
        f"Levenberg–Marquardt on a GRU of gain 3 (8 units, L = 512): {adaptive['iterations']} "
        f"iterations with adaptive damping; {best['iterations']} with the best constant, "
        f"μ = {best['damping']:g}.\n\nCompile time of the forward pass at L = 16,384, relative to "
        f"the scan's:\n\n{markdown(content['compile'])}"
    )


def state_tracking(content: Content) -> str:
    """The critical path of every method, in steps."""
    return markdown(_solves(content["solving"], "group", "solver"))


def trained(content: Content) -> str:
    """Iterations, critical path and error of each network and method; the networks' memory."""
    rows = content["short"] + content["long"]
    lines = [
        line | {"of the scan": f"{row['error of the scan']:.1e}"}
        for line, row in zip(_solves(rows, "network", "method"), rows, strict=True)
    ]
    memory = [
        f"{name} {min(steps):,} to {max(steps):,}" for name, steps in content["memory"].items()
    ]
    about = "Steps until a ten-thousandth of a disturbance is left, at six times: "
    return f"{markdown(lines)}\n\n{about}{', '.join(memory)}."


def trained_gates(content: Content) -> str:
    """What is left of disturbances, what the gates explain of it, and the singular values."""
    lines = [
        {
            "network": row["network"],
            "steps": row["steps"],
            "left": f"{row['left']:.2g}",
            "missed by the gates": f"{row['missed']:.2g}",
            "explained by the gates": f"{100 * row['explained']:.0f} %",
            "singular values above 0.1": f"{row['above 0.1']:.1f}",
            "above 1e-4": f"{row['above 0.0001']:.1f}",
        }
        for row in content["gates"]
        if row["steps"] in (1, 4, 16, 64, 256)
    ]
    return markdown(lines)


def trained_sweeps(content: Content) -> str:
    """Iterations and errors on networks of text, forward and of the derivative."""
    others = content["short"] + content["long"]
    rows = [*content["sweeps"], *(row for row in others if row["method"] != "ElementwiseNewton")]
    return _with_derivatives(rows, {row["network"] for row in content["long"]})


def trained_hard(content: Content) -> str:
    """The same on networks for which the elementwise part does not suffice."""
    text = {row["network"] for row in content["long"]}
    rows = content["sweeps"]
    return _with_derivatives(rows, {row["network"] for row in rows} - text)


def _with_derivatives(rows: list[Row], networks: set[str]) -> str:
    """A table of the solves of some networks, each once, by network, length, method and chunk."""
    keys = ("network", "L", "method", "chunk")
    found = {tuple(row[key] for key in keys): row for row in reversed(rows)}
    shown = [found[key] for key in sorted(found) if key[0] in networks]
    lines = []
    for line, row in zip(_solves(shown, "network", "method"), shown, strict=True):
        line["of the scan"] = f"{row['error of the scan']:.1e}"
        line |= {"derivative's iterations": "", "its error": "", "the scan's": ""}
        if "derivative" in row:
            late = ", finished sequentially" * row["derivative finished sequentially"]
            line["derivative's iterations"] = f"{row['derivative']}{late}"
            floor = row["error of the scan's derivative"]
            line["its error"] = f"{row['error of the derivative']:.1e}"
            line["the scan's"] = f"{floor:.1e}"
        lines.append(line)
    return markdown(lines)


# --- several devices --------------------------------------------------------------------------


def sharded_speed(content: Content) -> str:
    """How many times faster two devices are; misses of 1.6 in bold."""
    lines = []
    rows = [row for row in content["speed"] if row["solver"] == "default"]
    for (cell, size), part in _grouped(rows, "cell", "size"):
        line: Row = {"cell": cell, "units": size}
        for row in part:
            pages = "" if row["pages"] == "small" else ", huge pages"
            for kind, title in KINDS.items():
                faster, ceiling = (Spread(*row[key][kind]) for key in ("faster", "ceiling"))
                text = _bold(str(faster), faster.median < 1.6)
                line[title + pages] = f"{text} of {ceiling.median:.3g}"
            line["iterations"] = row["iterations"]
        lines.append(line)
    return markdown(lines)


def sharded_agreement(content: Content) -> str:
    """The worst over cells."""
    rows = sorted(content["agreement"], key=lambda r: (r["dtype"], r["solver"] != "default"))
    return markdown(
        [
            {"dtype": dtype, "solver": solver, "devices": devices, **_errors(part, dtype)}
            for (dtype, solver, devices), part in _grouped(rows, "dtype", "solver", "devices")
        ]
    )


def sharded_long(content: Content) -> str:
    """Memory and errors of a sequence that is long for one device."""
    found = content["long"]
    share = 8 * found["share of one device"]
    one, eight = (sum(found["bytes"][n].values()) / 1e6 for n in ("1", "8"))
    return (
        f"{found['cell']}, {found['size']} units, L = {found['length']:,}, forward and gradient: "
        f"{one:,.0f} MB on one device, {eight:,.0f} MB on each of eight, "
        f"{_bold(f'{share:.2f}', share > 1.3)} times an eighth (goal: 1.3). Value error "
        f"{found['value error']:.1e}, gradient error {found['gradient error']:.1e}."
    )


def sharded_traffic(content: Content) -> str:
    """Number and bytes of the collectives: of a solve whose first pass is right, and of an
    iteration."""
    lines = []
    for row, (kind, title) in itertools.product(content["traffic"], KINDS.items()):
        line: Row = {"cell": row["cell"], "units": row["size"], "solver": row["solver"]}
        line["program"] = title
        # A solve that is right at once evaluates the conditions of the other loops once.
        once = [c for c in row[kind] if "".join(c["loops"]) in ("", "passes?", "rest?")]
        inside = [c for c in row[kind] if c["loops"] and c["loops"][-1] == "iterations"]
        for name, part in (("in a solve", once), ("in an iteration", inside)):
            line[name] = sum(c["count"] for c in part)
            line[f"{name}: bytes"] = f"{sum(c['nbytes'] * c['count'] for c in part):,}"
        largest = max(c["nbytes"] for c in inside if c["kind"] == "all-gather")
        line["largest in an iteration"] = f"{largest:,}"
        lines.append(line)
    return markdown(lines)
