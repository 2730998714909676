"""The counts of `benchmarks gpu`: of a case, predicted times, comparison with committed ones."""

import datetime
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax

import pararnn as prnn
from pararnn.diagnostics._compare import interleaved, spread
from pararnn.jaxprs._counting import loop_turns

from . import _gpu_cases
from ._gpu_cases import Case, Program
from ._gpu_compile import CHIPS, Report, gpu_compile
from ._gpu_program import Loop, Totals, all_loops, totals
from .speed import Results

# The model of the predicted time, for an H200.
SUBMISSION_SECONDS = 4e-6  # 3 to 5 microseconds to launch a kernel or a CUDA graph
READ_SECONDS = 15e-6  # to wait for the device and to read a loop's condition back
BYTES_PER_SECOND = 4.3e12  # what large copies reach of 4.8e12
# The factor by which each may grow before the check against committed counts fails. Temporary
# memory is the compiler's choice.
SLACK = {"device_ops": 1.0, "submissions": 1.0, "temporary_bytes": 1.1}


def predicted_seconds(run: Totals) -> float:
    """The time of a run by the model; NaN if a loop turns nobody knows how often."""
    return (
        SUBMISSION_SECONDS * run.submissions
        + READ_SECONDS * run.reads
        + run.moved_bytes / BYTES_PER_SECOND
    )


# --- how often the loops turn -----------------------------------------------------------------


def place(path: str) -> str:
    """Where a loop is: of a path of scopes what the traced and the compiled program share, which is
    the names that the solvers give, the loops around it, and whether it is of the derivative."""
    kept = []
    for part in path.split("/"):
        kept += ["transpose"] * ("transpose(" in part) + re.findall(r"pararnn_\w+", part)
        kept += ["while"] * (part == "while")
    return "/".join(kept)


def turns_by_place(program: Program) -> dict[str, float]:
    """How often the loops at a place turn, each in all; observed by running the program here."""
    found: dict[str, list[int]] = {}
    for path, turned in loop_turns(program.function, *program.args):
        found.setdefault(place(path), []).append(turned)
    return {where: sum(turned) / len(turned) for where, turned in found.items()}


def counts(report: Report, turns: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a compiled program. `None` is what depends on a loop of unknown turns."""

    def turned(loop: Loop) -> float:
        return turns.get(place(loop.path), math.nan)

    run = totals(report.program, turned)
    uncounted = [loop for _, loop in all_loops(report.program) if loop.trip is None]
    return {
        **{key: _known(value) for key, value in run._asdict().items()},
        "loops": {place(loop.path) or loop.name: _known(turned(loop)) for loop in uncounted},
        "temporary_bytes": report.memory.temp_size_in_bytes,
        "registers": report.most("regs"),
        "spilled_bytes": report.most("spill_stores"),
        "compile_seconds": report.seconds,
        "predicted_seconds": _known(predicted_seconds(run)),
    }


def _known(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else value


# --- a case -----------------------------------------------------------------------------------


def measure(case: Case, chip: str | None, repetitions: int) -> dict[str, Any]:
    """The record of a case: what its programs take, and how long if there is a GPU (`chip=None`,
    which compiles for that)."""
    problem = _gpu_cases.problem(case)
    chosen = _gpu_cases.settings(case.solver, problem)
    record, turns = _observed(case, chosen)
    record["settings"] = [] if chosen is None else [repr(policy) for policy in chosen]
    for kind, program in _gpu_cases.programs(case, problem, chosen).items():
        report = gpu_compile(program.function, *program.args, chip=chip)
        if not report.ok:
            record[kind] = {"error": report.error[:500]}
            continue
        record[kind] = counts(report, turns)
        if chip is None:
            times = interleaved({"": _call(report.compiled, program.args)}, repetitions)[""]
            record[kind]["seconds"] = spread(times)
    return record


def _observed(case: Case, chosen: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """What a solve reports, and the turns of its loops, run here; if this fails, why."""
    if chosen is None:  # the scan's loop has a known number of turns
        return {}, {}
    shown = case._replace(length=case.observed or case.length)
    problem = _gpu_cases.problem(shown)
    try:
        # The gradient has the loops of the forward pass, too.
        *_, program = _gpu_cases.programs(shown, problem, chosen).values()
        stats, turns = _gpu_cases.statistics(problem, chosen), turns_by_place(program)
    except jax.errors.JaxRuntimeError as error:
        return {"not_observed": str(error)[:500]}, {}
    if stats["fallback"] and shown != case:
        # How many steps are left to finish one by one is not known from a shorter sequence.
        turns.pop("pararnn_finish/while", None)
    return stats, turns


def _call(compiled: Callable[..., Any], args: Sequence[Any]) -> Callable[[], Any]:
    return lambda: compiled(*args)


def environment(chip: str | None) -> dict[str, Any]:
    """What counts depend on: the versions and the chip; and whether it was there."""
    device = CHIPS[chip]["name"] if chip is not None else jax.devices()[0].device_kind
    try:
        plugin = importlib.metadata.version("jax-cuda12-plugin")
    except importlib.metadata.PackageNotFoundError:
        plugin = "unknown"
    return {
        "date": datetime.date.today().isoformat(),
        "chip": device,
        "measured": chip is None,
        "jax": jax.__version__,
        "plugin": plugin,
        "equinox": eqx.__version__,
        "pararnn": prnn.__version__,
    }


def run(
    cases: list[Case], results: Results, *, chip: str | None, repetitions: int, budget: float
) -> None:
    """Measures what is not there yet. A case is expected to take as long as the dearest before."""
    begin, dearest, skipped = time.perf_counter(), 0.0, 0
    for i, case in enumerate(cases):
        if case.key() in results.content["cases"]:
            continue
        start = time.perf_counter()
        if start - begin + dearest > budget:
            skipped += 1
            continue
        print(f"[{i + 1}/{len(cases)}] {case.key()}", flush=True)
        record = measure(case, chip, repetitions)
        seconds = time.perf_counter() - start
        dearest = max(dearest, seconds)
        results.add(case.key(), {**case._asdict(), "seconds": seconds, **record})
        jax.clear_caches()
    if skipped:
        print(f"{skipped} cases did not fit into {budget:g} seconds; call again to go on.")


# --- the check against committed counts -------------------------------------------------------


def grown(committed: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What takes more than in the committed results, by `SLACK`."""
    complaints = []
    for key, record in found["cases"].items():
        before = committed["cases"].get(key)
        if before is None:
            complaints.append(f"{key}: there are no committed counts")
            continue
        for kind in _gpu_cases.KINDS:
            for name, slack in SLACK.items():
                old, new = (r.get(kind, {}).get(name) for r in (before, record))
                if old is not None and (new is None or new > old * slack):
                    complaints.append(f"{key}, {kind}: {name} was {old}, is {new}")
    return complaints
