"""Timing, machine description and tables, shared by all benchmarks."""

import datetime
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax

import pararnn as prnn
from pararnn.diagnostics import relative_error as relative_error
from pararnn.diagnostics import scan_states as scan_states
from pararnn.diagnostics._compare import interleaved as interleaved
from pararnn.diagnostics._compare import ratio as ratio


def environment() -> dict[str, Any]:
    """What a figure needs beside it to mean anything."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "pararnn": prnn.__version__,
    }


def compile_seconds(
    makes: dict[str, Callable[[], Any]], *args: Any, repetitions: int = 5
) -> dict[str, list[float]]:
    """Seconds to trace, lower and compile fresh jitted functions, A B A B …"""
    times: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(repetitions):
        for name, make in makes.items():
            function = make()
            start = time.perf_counter()
            function.lower(*args).compile()
            times[name].append(time.perf_counter() - start)
    return times


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as its header."""

    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(row.get(key, "")) for key in header) + " |" for row in rows]
    return "\n".join(lines)


def earlier(path: pathlib.Path, instead: str, here: dict[str, Any] | None = None) -> dict[str, Any]:
    """The results in a file of this machine, or of what else they belong to (`here`); of another
    one, exits and says what to do `instead`, as results of two machines must not be mixed."""
    found, here = json.loads(path.read_text()), here or environment()
    other = {k for k in here if k != "date" and here[k] != found["environment"].get(k)}
    if other:
        raise SystemExit(
            f"{path} was measured with another {', '.join(sorted(other))}: {instead}, or choose "
            "another --output."
        )
    return found


def other_parts(name: str, folder: str, parts: Sequence[str], every: Iterable[str]) -> Any:
    """What `folder/name.json` has of a benchmark of which only some `parts` are measured again."""
    path = pathlib.Path(folder) / f"{name}.json"
    if not path.exists() or set(parts) == set(every):
        return {}
    found = earlier(path, "measure all parts")
    del found["environment"]
    return found


def save(name: str, results: dict[str, Any], folder: str) -> pathlib.Path:
    """Writes the results with the environment to `folder/name.json`."""
    path = pathlib.Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    return path
