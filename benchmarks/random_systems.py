"""Is a wrong answer ever silent? Random systems, from harmless to hostile, under all solvers.

Results go to a JSON file after each group of systems: a call that was stopped goes on where it was.
"""

import argparse
import json
import pathlib
from collections import Counter
from typing import Any

import jax
from tqdm import tqdm

from ._measure import earlier, environment
from ._random_systems import GROUP, VERDICTS, group

FLAGS = ("forgets", "finished sequentially")
_CLEAR = 20  # groups


class Results:
    """Counts by family, the systems that were silently wrong, and how many groups are done."""

    def __init__(self, path: pathlib.Path, fresh: bool):
        self.path = path
        self.content: dict[str, Any] = {
            "environment": environment(), "groups": 0, "families": {}, "silent": []
        }  # fmt: skip
        if path.exists() and not fresh:
            self.content = earlier(path, "add --fresh to begin anew")

    def add(self, rows: list[dict[str, Any]]) -> None:
        counts = Counter(self.content["families"].get(rows[0]["family"], {}))
        for row in rows:
            counts.update(["systems", row["verdict"], *(flag for flag in FLAGS if row[flag])])
        self.content["families"][rows[0]["family"]] = dict(counts)
        self.content["silent"] += [row for row in rows if row["verdict"] == VERDICTS[-1]]
        self.content["groups"] += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)  # never half a file


def table(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per family, and their sum."""
    families = {name: Counter(counts) for name, counts in sorted(content["families"].items())}
    families["all"] = sum(families.values(), Counter())
    keys = ("systems", *VERDICTS, *FLAGS)
    return [
        {"family": name, **{key: f"{counts[key]:,}" for key in keys}}
        for name, counts in families.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks random_systems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--systems", type=int, default=10_000, help="how many in all")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = Results(pathlib.Path(args.output) / "random_systems.json", args.fresh)
    last = -(-args.systems // GROUP)
    for number in tqdm(range(results.content["groups"], last), desc="groups of systems"):
        results.add(list(group(number)))
        if number % _CLEAR == 0:
            jax.clear_caches()  # a process may hold only so many programs
    for line in table(results.content):
        print(line)
    print(f"silently wrong: {len(results.content['silent'])}")


if __name__ == "__main__":
    main()
