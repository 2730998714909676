"""Is a wrong answer ever silent? Random systems, from harmless to hostile, under all solvers.

Results go to a JSON file after each group of systems; the same call continues an interrupted one.
"""

from collections import Counter
from typing import Any

import jax
from tqdm import tqdm

from ._measure import Results, Row, markdown, parser
from ._random_systems import GROUP, VERDICTS, group

FLAGS = ("forgets", "finished sequentially")
_CLEAR = 20  # groups after which compiled programs are dropped


def add(results: Results, rows: list[Row]) -> None:
    """Adds a group of systems of one family: its counts, and the systems that were silently
    wrong."""
    content = results.content
    families, family = content.setdefault("families", {}), rows[0]["family"]
    counts = Counter(families.get(family, {}))
    for row in rows:
        counts.update(["systems", row["verdict"], *(flag for flag in FLAGS if row[flag])])
    families[family] = dict(counts)
    silent = [row for row in rows if row["verdict"] == "SILENT"]
    content["silent"] = content.get("silent", []) + silent
    results.put("groups", content.get("groups", 0) + 1)


def table(content: dict[str, Any]) -> str:
    """Verdicts by family, and each system that was silently wrong."""
    families = {name: Counter(counts) for name, counts in sorted(content["families"].items())}
    families["all"] = sum(families.values(), Counter())
    keys = ("systems", *VERDICTS, *FLAGS)
    rows = [
        {"family": name, **{key: f"{counts[key]:,}" for key in keys}}
        for name, counts in families.items()
    ]
    silent = content["silent"]
    return "\n\n".join(markdown(part) for part in (rows, silent) if part)


def main(argv: list[str] | None = None) -> None:
    command = parser("random_systems", __doc__)
    command.add_argument("--systems", type=int, default=10_000, help="how many in all")
    command.add_argument("--fresh", action="store_true", help="discard earlier results")
    args = command.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = Results(args.output / "random_systems.json", args.fresh)
    groups = range(results.content.get("groups", 0), -(-args.systems // GROUP))
    for number in tqdm(groups, desc="groups of systems"):
        add(results, list(group(number)))
        if number % _CLEAR == 0:
            jax.clear_caches()  # the number of compiled programs per process is limited
    print(table(results.content))
