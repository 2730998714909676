"""The tables of `benchmarks sharded`, and what its plot shows."""

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from pararnn.diagnostics import Spread

from . import _scaling
from ._measure import markdown
from ._plots import KINDS
from ._summaries import ERRORS, GOALS

# On two devices, how many times faster than on one.
FASTER = 1.6
# Of the memory that one device needs, the share of eight should be this times an eighth.
SHARE = 1.3
# In a file of results: the time on one device, and on several.
_ALONE = {"forward": "scan", "gradient": "own gradient"}
_SCALES = (65_536, 4_194_304)

Content = dict[str, Any]


def _marked(text: str, right: bool) -> str:
    return text if right else f"**{text}**"


def speed(content: Content) -> str:
    """How many times faster two devices are; misses in bold."""
    lines: dict[Any, dict[str, Any]] = {}
    for row in content["speed"]:
        if row["solver"] != "default":
            continue
        line = lines.setdefault(
            (row["cell"], row["size"]), {"cell": row["cell"], "units": row["size"]}
        )
        for kind, title in KINDS.items():
            found, ceiling = (Spread(*row[key][kind]) for key in ("faster", "ceiling"))
            pages = "" if row["pages"] == "small" else ", huge pages"
            marked = _marked(str(found), found.median >= FASTER)
            line[title + pages] = f"{marked} of {ceiling.median:.3g}"
        line["iterations"] = row["iterations"]
    return markdown(list(lines.values()))


def agreement(content: Content) -> str:
    """The worst over cells."""
    lines = []
    rows = content["agreement"]
    for dtype, solver in itertools.product(("float32", "float64"), ("default", "Newton")):
        for devices in sorted({row["devices"] for row in rows}):
            part = [
                row
                for row in rows
                if (row["dtype"], row["solver"], row["devices"]) == (dtype, solver, devices)
            ]
            line: dict[str, Any] = {"dtype": dtype, "solver": solver, "devices": devices}
            for key, goal in zip(ERRORS, GOALS[dtype], strict=True):
                worst = max(row[key] for row in part)
                line[f"{key} (goal)"] = f"{_marked(f'{worst:.1e}', worst <= goal)} ({goal:.0e})"
            lines.append(line)
    return markdown(lines)


def long(content: Content) -> str:
    found = content["long"]
    share = 8 * found["share of one device"]
    one, eight = (sum(found["bytes"][str(n)].values()) / 1e6 for n in (1, 8))
    return (
        f"{found['cell']}, {found['size']} units, L = {found['length']:,}, forward and gradient: "
        f"{one:,.0f} MB on one device, {eight:,.0f} MB on each of eight, "
        f"{_marked(f'{share:.2f}', share <= SHARE)} times an eighth (goal: {SHARE}). Value error "
        f"{found['value error']:.1e}, gradient error {found['gradient error']:.1e}."
    )


def traffic(content: Content) -> str:
    """Number and bytes of the collectives, by the loop in which they stand."""
    lines = []
    for row, kind in itertools.product(content["traffic"], KINDS):
        line: dict[str, Any] = {
            "cell": row["cell"],
            "units": row["size"],
            "solver": row["solver"],
            "program": KINDS[kind],
        }
        turned = _scaling.turns(iterations=1)
        inside = [one for one in row[kind] if "iterations" in one["loops"]]
        once = [one for one in row[kind] if "iterations" not in one["loops"]]
        for title, part in (("in a solve", once), ("in an iteration", inside)):
            turned_here = turned | ({"rest": 1} if part is inside else {})
            made = _scaling.exchanges(part, turned_here)
            line[title] = sum(times for *_, times in made)
            line[f"{title}: bytes"] = f"{sum(n * times for _, n, times in made):,}"
        gathers = [one["nbytes"] for one in inside if one["kind"] == "all-gather"]
        line["largest in an iteration"] = f"{max(gathers):,}"
        lines.append(line)
    return markdown(lines)


# --- the model --------------------------------------------------------------------------------


def _made(content: Content, row: dict[str, Any], kind: str) -> list[tuple[str, int, int]]:
    """The exchanges of a program, as counted; those of a cell that was not counted are those of
    one with a dense Jacobian."""
    cell = row["cell"] if row["cell"] == "DiagonalGRU" else "GRU"
    wanted = cell, row["size"], row["solver"]
    found = next(
        one for one in content["traffic"] if (one["cell"], one["size"], one["solver"]) == wanted
    )
    return _scaling.exchanges(found[kind], _scaling.turns(row["iterations"]))


def _predicted(content: Content, row: dict[str, Any], kind: str, network) -> float:
    step = row["seconds"][_ALONE[kind]][0] / row["length"]
    made = _made(content, row, kind)
    return _scaling.speed_up(step, row["length"], 2, network, made)


def _comparisons(content: Content) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """`(where, row, network)` of all that the model can be compared with: solves in one sweep."""
    for row in content["speed"]:
        if row["solver"] == "default" and row["iterations"] == 0:
            network = _measured_network(content["exchanges"]["devices"])
            yield f"two devices, {row['pages']} pages", row, network
    base = _measured_network(content["exchanges"]["processes"])
    for row in content["lines"]:
        if row["iterations"] == 0:
            # There and back: a message goes when the other side has said that it waits.
            network = _scaling.Network(base.latency + 2 * row["delay"], row["rate"])
            yield f"two processes, {2e3 * row['delay']:g} ms there and back", row, network


def _measured_network(exchanges: dict[str, dict[str, float]]) -> _scaling.Network:
    """From exchanges between two: of next to nothing, and of a lot."""
    times = {int(n): seconds for n, seconds in exchanges["collective-permute"].items()}
    little, most = min(times.values()), max(times)
    return _scaling.Network(little, most / max(times[most] - little, 1e-9))


def model(content: Content) -> str:
    """Predicted and measured speed-ups, for two."""
    lines = []
    for where, row, network in _comparisons(content):
        line: dict[str, Any] = {"where": where, "cell": row["cell"], "units": row["size"]}
        for kind, title in KINDS.items():
            measured = row["seconds"][_ALONE[kind]][0] / row["seconds"][kind][0]
            line[f"{title}: predicted"] = f"{_predicted(content, row, kind, network):.2f}"
            line["measured" if kind == "forward" else "measured "] = f"{measured:.2f}"
        lines.append(line)
    return markdown(lines)


def curves(content: Content) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By panel and network, the predicted speed-ups of forward and gradient over the devices."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    devices = [2**i for i in range(13)]
    for length, (cell, size) in itertools.product(_SCALES, (("DiagonalGRU", 64), ("GRU", 256))):
        row = next(
            row
            for row in content["speed"]
            if (row["cell"], row["size"], row["solver"]) == (cell, size, "default")
        )
        step = row["seconds"]["own gradient"][0] / row["length"]
        made = _made(content, row, "gradient")
        panels[f"{cell}, {size} units, L = {length:,}"] = {
            name: [
                (n, _scaling.speed_up(step, length, n, network, made))
                for n in devices
                if n <= length // _scaling.EARLY
            ]
            for name, network in _scaling.NETWORKS.items()
        }
    return panels


TABLES = {
    "sharded-speed": speed,
    "sharded-agreement": agreement,
    "sharded-long": long,
    "sharded-traffic": traffic,
    "sharded-model": model,
}


def load(folder: pathlib.Path) -> Content | None:
    path = folder / "sharded.json"
    return json.loads(path.read_text()) if path.exists() else None


def blocks(folder: pathlib.Path) -> dict[str, str]:
    """What stands between the markers of each name."""
    content = load(folder)
    if content is None:
        return dict.fromkeys(TABLES, "Not measured.")
    made = content["environment"]
    about = (
        f"`python -m benchmarks sharded`, {made['device']}, {made['cores']} cores, JAX "
        f"{made['jax']}, {made['date']}."
    )
    return {name: f"{about}\n\n{table(content)}" for name, table in TABLES.items()}
