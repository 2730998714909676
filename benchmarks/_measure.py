"""The machine, the result files, the command lines and the Markdown tables of all benchmarks."""

import argparse
import datetime
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

import pararnn as prnn
from pararnn.diagnostics import Spread as Spread
from pararnn.diagnostics import relative_error as relative_error
from pararnn.diagnostics._compare import compare as compare
from pararnn.diagnostics._compare import interleaved as interleaved
from pararnn.diagnostics._compare import ratio as ratio
from pararnn.diagnostics._compare import spread as spread

RESULTS = pathlib.Path(__file__).parent / "results"

Row = dict[str, Any]


def environment() -> Row:
    """The machine and the versions, without which a measurement means nothing."""
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


class Results:
    """A JSON file of the results of one machine, written after each part.

    **Arguments:**

    - `path`: the file. If it exists its results are loaded, so that an interrupted command
        continues where it stopped.
    - `fresh`: whether to discard them instead.
    - `about`: the environment; the default is that of this machine.

    Raises SystemExit if the file is of another environment.
    """

    def __init__(self, path: pathlib.Path, fresh: bool = False, about: Row | None = None):
        self.path = path
        about = about or environment()
        self.content: dict[str, Any] = {"environment": about}
        if not path.exists() or fresh:
            return
        self.content = json.loads(path.read_text())
        found = self.content["environment"]
        other = sorted(k for k in about if k != "date" and about[k] != found.get(k))
        if other:
            raise SystemExit(
                f"{path} was measured with another {', '.join(other)}: measure all again (--fresh) "
                "or choose another --output."
            )

    def put(self, name: str, value: Any) -> None:
        """Sets one part, with its date, and writes the file."""
        self.content[name] = value
        self.content.setdefault("dates", {})[name] = datetime.date.today().isoformat()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        parts = (f"{json.dumps(k)}: {_lines(_rounded(v))}" for k, v in self.content.items())
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        partial.replace(self.path)  # an interrupt never leaves half a file


def date_of(content: dict[str, Any], part: str) -> str:
    """The day on which a part of a result file was measured."""
    return content.get("dates", {}).get(part, content["environment"]["date"])


def _lines(value: Any) -> str:
    """JSON with one record per line, so that a change of one result is a change of one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        return (
            "{\n"
            + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            + "\n}"
        )
    return json.dumps(value)


def _rounded(value: Any) -> Any:
    """To six digits, more than any measurement here has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def parser(
    name: str, description: str | None, parts: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The command line of a benchmark: `--output`, and `--parts` if it has parts."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--output", type=pathlib.Path, default=RESULTS, help="folder of the JSON file"
    )
    if parts:
        made.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    return made


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with the keys of the first row as its header."""

    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(row.get(key, "")) for key in header) + " |" for row in rows]
    return "\n".join(lines)
