"""One sequence on several devices, against one: how much faster, how exact, what travels, what it
takes of memory; and what a network would make of it.

Each question is asked in processes of its own, with CPU devices; on a machine of N cores only N of
them run side by side, so times are of as many devices as the machine has cores, 2 unless told
otherwise. Two processes on an emulated slow line (Linux, as root) check the model of a network.
"""

import argparse
import itertools
import os
import pathlib
from typing import Any

from . import _emulated_line, _sharded_parts
from ._measure import other_parts, save
from ._several import in_processes, on_devices

CELLS = ("Elman", "GRU", "DiagonalGRU")
SIZES = (64, 256)
LENGTH = 65_536
LONG = 4_194_304
PARTS = ("speed", "agreement", "long", "traffic", "exchanges", "lines")
# Delays one way, in seconds, at 100 Mbit/s.
DELAYS, RATE = (0.0005, 0.005, 0.025), 12.5e6
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def speed(repetitions: int, limit: float) -> list[dict[str, Any]]:
    """The cells on two devices, with the memory pages of the system and with large ones."""
    rows = []
    cases = [
        (cell, size, "default", pages)
        for pages, cell, size in itertools.product(("small", "huge"), CELLS, SIZES)
    ]
    for cell, size, solver, pages in [*cases, ("DiagonalGRU", 64, "Newton", "small")]:
        print(f"speed: {cell}, {size} units, {solver}, {pages} pages", flush=True)
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES if pages == "huge" else ""
        load = os.getloadavg()[0]
        found = on_devices(
            2,
            _sharded_parts.speed,
            cell=cell,
            size=size,
            length=LENGTH,
            solver=solver,
            repetitions=repetitions,
            limit=limit,
        )
        row = {"cell": cell, "size": size, "length": LENGTH, "solver": solver, "pages": pages}
        rows.append({**row, "load": load, **found})
    del os.environ["GLIBC_TUNABLES"]
    return rows


def agreement() -> list[dict[str, Any]]:
    """Errors against the scan on one device."""
    rows = []
    cases = itertools.product((1, 2, 4, 8), CELLS, ("default", "Newton"), ("float32", "float64"))
    for devices, cell, solver, dtype in cases:
        print(f"agreement: {devices} devices, {cell}, {solver}, {dtype}", flush=True)
        case = {"cell": cell, "size": 32, "length": 4_099, "solver": solver, "dtype": dtype}
        found = on_devices(devices, _sharded_parts.agreement, **case)
        rows.append({"devices": devices, **case, **found})
    return rows


def long() -> dict[str, Any]:
    """A sequence that is long for one device: its memory, and whether it is right."""
    case = {"cell": "DiagonalGRU", "size": 8, "length": LONG}
    print(f"long: {case}", flush=True)
    needed = {n: on_devices(n, _sharded_parts.memory, **case) for n in (1, 8)}
    one, share = (sum(needed[n].values()) for n in (1, 8))
    found = on_devices(8, _sharded_parts.agreement, solver="default", dtype="float32", **case)
    return {**case, "bytes": needed, "share of one device": share / one, **found}


def traffic() -> list[dict[str, Any]]:
    """The collectives of the compiled programs on eight devices."""
    rows = []
    for cell, size, solver in itertools.product(CELLS[1:], SIZES, ("default", "Newton")):
        print(f"traffic: {cell}, {size} units, {solver}", flush=True)
        case = {"cell": cell, "size": size, "length": LENGTH, "solver": solver}
        rows.append({**case, **on_devices(8, _sharded_parts.traffic, **case)})
    return rows


def exchanges() -> dict[str, Any]:
    """What the collectives take on this machine: between devices of a process, and processes."""
    sizes = [4, 1_024, 65_536, 1_048_576]
    print("exchanges", flush=True)
    return {
        "devices": on_devices(2, _sharded_parts.exchanges, sizes=sizes),
        "processes": in_processes([(), ()], "127.0.0.1", _sharded_parts.exchanges, sizes=sizes),
    }


def lines(repetitions: int, limit: float) -> list[dict[str, Any]]:
    """Two processes, and a slow line between them."""
    if not _emulated_line.is_possible():
        print("lines: not possible here (Linux, as root, with /dev/net/tun)")
        return []
    rows = []
    for delay, cell in itertools.product(DELAYS, CELLS[1:]):
        print(f"lines: {1e3 * delay:g} ms, {cell}", flush=True)
        case = {"cell": cell, "size": 256, "length": LENGTH, "solver": "default"}
        with _emulated_line.line(delay, RATE) as ends:
            found = in_processes(
                ends,
                _emulated_line.ADDRESSES[0],
                _sharded_parts.speed,
                repetitions=repetitions,
                limit=limit,
                **case,
            )
        rows.append({"delay": delay, "rate": RATE, **case, **found})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sharded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repetitions", type=int, default=41)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of timing per case")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    results = other_parts("sharded", args.output, args.parts, PARTS)
    timed = {"speed": speed, "lines": lines}
    counted = {"agreement": agreement, "long": long, "traffic": traffic, "exchanges": exchanges}
    path = pathlib.Path(args.output)
    for part in args.parts:
        if part in timed:
            results[part] = timed[part](args.repetitions, args.limit)
        else:
            results[part] = counted[part]()
        path = save("sharded", results, args.output)  # a run that is stopped keeps what it has
    print(f"\nwritten to {path}")
