"""The counts of a case, the predicted times, and the comparison with committed counts."""

import datetime
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax

import pararnn as prnn
from benchmarks._measure import Results, interleaved, spread
from pararnn.jaxprs._counting import loop_turns

from ._cases import KINDS, Case, Program, cell_and_inputs, programs, settings
from ._compile import CHIP, Report, gpu_compile
from ._program import Loop, Totals, all_loops, totals

# The model of the predicted time, for an H200.
SUBMISSION_SECONDS = 4e-6  # 3 to 5 microseconds to launch a kernel or a CUDA graph
READ_SECONDS = 15e-6  # to wait for the device and to read a loop's condition back
BYTES_PER_SECOND = 4.3e12  # large copies reach this of 4.8e12
# The factor by which each may grow before the check against committed counts fails. Temporary
# memory is the compiler's choice.
SLACK = {"device_ops": 1.0, "submissions": 1.0, "temporary_bytes": 1.1}


def predicted_seconds(run: Totals) -> float:
    """The time of a run by the model; NaN if a loop has unknown trips."""
    return (
        SUBMISSION_SECONDS * run.submissions
        + READ_SECONDS * run.reads
        + run.moved_bytes / BYTES_PER_SECOND
    )


# --- trips of loops ---------------------------------------------------------------------------


def scope(path: str) -> str:
    """The part of a path of name scopes that the traced and the compiled program share: the
    package's scopes, the loops, and whether it belongs to the derivative."""
    shared = []
    for part in path.split("/"):
        shared += ["transpose"] * ("transpose(" in part) + re.findall(r"pararnn_\w+", part)
        shared += ["while"] * (part == "while")
    return "/".join(shared)


def trips_by_scope(program: Program) -> dict[str, float]:
    """The mean trips of the loops of each scope in a run, counted by running the program here."""
    found: dict[str, list[int]] = {}
    for path, trips in loop_turns(program.function, *program.args):
        found.setdefault(scope(path), []).append(trips)
    return {where: sum(trips) / len(trips) for where, trips in found.items()}


def counts(report: Report, trips: Mapping[str, float]) -> dict[str, Any]:
    """The counts of a compiled program. `None` depends on a loop with unknown trips."""

    def trips_of(loop: Loop) -> float:
        return trips.get(scope(loop.path), math.nan)

    run = totals(report.program, trips_of)
    dynamic = [loop for loop in all_loops(report.program) if loop.trip is None]
    return {
        **{key: _none_if_nan(value) for key, value in run._asdict().items()},
        "loops": {scope(loop.path) or loop.name: _none_if_nan(trips_of(loop)) for loop in dynamic},
        "temporary_bytes": report.memory.temp_size_in_bytes,
        "registers": report.most("regs"),
        "spilled_bytes": report.most("spill_stores"),
        "compile_seconds": report.seconds,
        "predicted_seconds": _none_if_nan(predicted_seconds(run)),
    }


def _none_if_nan(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else value


# --- a case -----------------------------------------------------------------------------------


def measure(case: Case, has_gpu: bool, repetitions: int) -> dict[str, Any]:
    """The record of a case: the counts of its programs, and their times if there is a GPU."""
    chosen = settings(case.solver, *cell_and_inputs(case))
    record, trips = _observed(case, chosen)
    record["settings"] = [] if chosen is None else [repr(policy) for policy in chosen]
    compiled = programs(case, chosen)
    for kind in case.kinds:
        function, args = compiled[kind]
        report = gpu_compile(function, *args, has_gpu=has_gpu)
        if report.error:
            record[kind] = {"error": report.error[:500]}
            continue
        record[kind] = counts(report, trips)
        if has_gpu:
            call = functools.partial(report.compiled, *args)
            record[kind]["seconds"] = spread(interleaved({"": call}, repetitions)[""])
    return record


def _observed(case: Case, chosen: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The statistics of a solve and the trips of its loops, by running it here; the error if this
    fails."""
    if chosen is None:  # the scan's loop has a static trip count
        return {}, {}
    shorter = case._replace(length=case.observed or case.length)
    try:
        made = programs(shorter, chosen)
        # The gradient has the loops of the forward pass, too.
        trips = trips_by_scope(made[case.kinds[-1]])
        stats = jax.jit(made["stats"].function)(*made["stats"].args)
    except jax.errors.JaxRuntimeError as error:
        return {"not_observed": str(error)[:500]}, {}
    record = {
        "iterations": int(stats.iterations),
        "sequential_steps": int(stats.sequential_steps),
        "fallback": bool(stats.fallback),
    }
    if record["fallback"] and shorter != case:
        # The number of steps to finish sequentially does not follow from a shorter sequence.
        trips.pop("pararnn_finish/while", None)
    return record, trips


def environment(has_gpu: bool) -> dict[str, Any]:
    """Chip and versions, on which counts depend, and whether times are measured."""
    try:
        plugin = importlib.metadata.version("jax-cuda12-plugin")
    except importlib.metadata.PackageNotFoundError:
        plugin = "unknown"
    return {
        "date": datetime.date.today().isoformat(),
        "chip": jax.devices()[0].device_kind if has_gpu else CHIP["name"],
        "measured": has_gpu,
        "jax": jax.__version__,
        "plugin": plugin,
        "equinox": eqx.__version__,
        "pararnn": prnn.__version__,
    }


def run(
    cases: list[Case], results: Results, *, has_gpu: bool, repetitions: int, budget: float
) -> None:
    """Measures the cases that are not in `results` yet; starts none after `budget` seconds."""
    begin = time.perf_counter()
    for i, case in enumerate(cases):
        records = results.content.setdefault("cases", {})
        if case.key() in records:
            continue
        start = time.perf_counter()
        if start - begin > budget:
            print(f"{budget:g} seconds are over; call again to continue.")
            return
        print(f"[{i + 1}/{len(cases)}] {case.key()}", flush=True)
        record = {**case._asdict(), **measure(case, has_gpu, repetitions)}
        seconds = time.perf_counter() - start
        results.put("cases", records | {case.key(): {**record, "seconds": seconds}})
        jax.clear_caches()


# --- the check against committed counts -------------------------------------------------------


def grown(committed: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The counts that exceed the committed ones by more than `SLACK`."""
    complaints = []
    for key, record in found["cases"].items():
        before = committed["cases"].get(key)
        if before is None:
            complaints.append(f"{key}: there are no committed counts")
            continue
        for kind in KINDS:
            for name, slack in SLACK.items():
                old, new = (r.get(kind, {}).get(name) for r in (before, record))
                if old is not None and (new is None or new > old * slack):
                    complaints.append(f"{key}, {kind}: {name} was {old}, is {new}")
    return complaints
