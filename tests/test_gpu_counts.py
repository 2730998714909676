"""The counts of a GPU's program, read from XLA's dumps; and collectives, read from HLO."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from benchmarks import _gpu_tables
from tools import hlo
from tools.collectives import Collective, collectives
from tools.gpu_counts import __main__ as gpu
from tools.gpu_counts import _bytes, _cases, _counts, _program
from tools.gpu_counts._cases import Case
from tools.gpu_counts._compile import Report
from tools.gpu_counts._program import Block, Loop, Totals, totals

ROOT = pathlib.Path(__file__).parents[1]

# --- bytes ------------------------------------------------------------------------------------

# A loop of which each turn takes a row of `x`, adds one, and puts it into `y`.
HLO = """
HloModule jit_f, is_scheduled=true

%fused (p0: f32[8,4], p1: s32[], p2: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[8,4]{1,0} parameter(2)
  %c = s32[] constant(0)
  %row = f32[1,4]{1,0} dynamic-slice(%p2, %p1, %c), dynamic_slice_sizes={1,4}
  %one = f32[1,4]{1,0} constant({...})
  %sum = f32[1,4]{1,0} add(%row, %one)
  ROOT %put = f32[8,4]{1,0} dynamic-update-slice(%p0, %sum, %p1, %c)
}

%body (arg: (s32[], f32[8,4], f32[8,4])) -> (s32[], f32[8,4], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0}, /*index=2*/f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %y = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=2
  %new = f32[8,4]{1,0} fusion(%y, %i, /*index=2*/%x), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%i, %new, %x)
}

%test (arg: (s32[], f32[8,4], f32[8,4])) -> pred[] {
  %arg.1 = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %bound = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %copied = f32[8,4]{1,0} copy(%x.1)
  %start = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%zero, %copied, %x.1)
  %while.1 = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) while(%start), condition=%test, body=%body, \
metadata={op_name="jit(f)/pararnn_finish/while"}TRIP
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""
THUNKS = """000: kCopy [source | next=001 (1)] kCopy
001: kWhile [prev=000 (1) | next=000 (1)]
condition:
    002: kCustomKernel [source | sink] compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        003: kCustomKernel [source | next=004 (1)] fusion grid: [1, 1, 1]
        004: kDynamicSliceFusion [prev=003 (1) | sink] params=1, results=1
            005: kCopy [source | sink] kCopy
006: kWhile [prev=000 (1) | sink]
condition:
    No thunks.      body:
    007: kCustomKernel [source | sink] other grid: [1, 1, 1]
"""
METADATA = 'profile_annotation: "while.1" thunk_id: 1'
KNOWN = ', backend_config={"known_trip_count":{"n":"8"}}'


def read(trip):
    return _program.read_program(THUNKS, METADATA, HLO.replace("TRIP", trip))


def test_of_slices_what_is_taken_counts():
    read = hlo.read_hlo(HLO.replace("TRIP", KNOWN))
    moved = _bytes.Moved(read)
    assert read.entry == "main" and read.loops["while.1"].trip == 8
    assert moved.by("main") == 2 * 8 * 4 * 4  # the copy
    assert moved.by("body") == 2 * 4 * 4 + 4  # a row each, and the index
    assert moved.by("test") == 4 + 4 + 1


def test_a_program_is_read():
    block = read("")
    assert (block.device_ops, block.submissions) == (1, 1)
    first, second = block.loops
    assert first.path == "jit(f)/pararnn_finish/while" and first.trip is None
    assert (first.body.device_ops, first.body.submissions) == (2, 1)
    assert (first.condition.device_ops, first.condition.submissions) == (1, 1)
    assert second.path == "" and second.condition.device_ops == 0 and second.body.device_ops == 1


def test_trips_multiply():
    block = read(KNOWN)
    block.loops.pop()
    # The condition of a counted loop is not asked.
    assert totals(block) == Totals(1 + 8 * 2, 1 + 8, 256 + 8 * 36, 0)
    block = read("")
    block.loops.pop()
    assert all(math.isnan(value) for value in totals(block))
    assert totals(block, lambda _: 3) == Totals(1 + 4 + 3 * 2, 1 + 4 + 3, 256 + 4 * 9 + 3 * 36, 4)
    assert totals(block, lambda _: 0) == Totals(2, 2, 256 + 9, 1)
    block.loops[0].in_graph = True  # the host does not ask
    assert totals(block, lambda _: 3).reads == 0


def test_loops_in_loops():
    inner = Loop("inner", "", None, Block(1, 1), Block(2, 1))
    outer = Loop("outer", "", None, Block(1, 1), Block(0, 0, 0, [inner]))
    counted = Loop("counted", "", 10, Block(9, 9), Block(1, 1, 0, [outer]))
    trips = {"outer": 20, "inner": 50}  # in the whole run
    # 10 trips; 10 + 20 conditions; 20 + 50 conditions, and 50 trips.
    ops = 10 + 30 + 70 + 50 * 2
    run = totals(Block(loops=[counted]), lambda loop: trips[loop.name])
    assert run == Totals(ops, 10 + 30 + 70 + 50, 0, 30 + 70)


# --- cases ------------------------------------------------------------------------------------


def test_scopes_of_traced_and_compiled_programs_agree():
    compiled = "jit(f)/transpose(jvp(jit(solve)))/checkpoint/pararnn_rest/while/body/"
    traced = "/transpose(jvp())//pararnn_rest/while/"
    scope = "transpose/pararnn_rest/while/pararnn_iterations/while"
    assert _counts.scope(compiled + "pararnn_iterations/while") == scope
    assert _counts.scope(traced + "pararnn_iterations/while") == scope


def test_default_cases_ask_each_question_once():
    cases = [*_cases.default_cases()]
    keys = [case.key() for case in cases]
    assert len(set(keys)) == len(keys)
    # What is checked is among what is committed.
    assert {case.key() for case in _cases.quick_cases()} <= set(keys)
    assert gpu.chosen_cases(None, cases) == cases
    assert {case.length for case in gpu.chosen_cases(["L=1024"], cases)} == {1024}
    with pytest.raises(SystemExit, match="`--cases` must be parts of"):
        gpu.chosen_cases(["Nothing"], cases)


def test_settings_are_complete():
    made = _cases.cell_and_inputs(Case("DiagonalGRU", 4, 128, "choice"))
    assert _cases.settings(_cases.SCAN, *made) is None
    for text in ("choice", "Newton(16)"):
        solver, adjoint = _cases.settings(text, *made)
        assert isinstance(solver, prnn.Newton) and solver.linear_method is not None
        assert adjoint.solver == solver and solver.chunk_size is not None
        without, _ = _cases.settings(f"{text}-kernels", *made)
        assert solver.sweep_method == prnn.sweeps.Fused() != without.sweep_method
    assert "PARARNN_KERNELS" not in os.environ


@pytest.mark.slow
def test_programs_are_those_of_the_scan():
    """Values and gradients, and the trips of the loops."""
    found = {}
    for name in (_cases.SCAN, "Newton(16)-kernels"):
        case = Case("DiagonalGRU", 3, 64, name)
        programs = _cases.programs(case, _cases.settings(name, *_cases.cell_and_inputs(case)))
        found[name] = jax.jit(programs["gradient"].function)(*programs["gradient"].args)
    for ours, theirs in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    trips = _counts.trips_by_scope(programs["forward"])
    # The first iterations are in no loop.
    (inside,) = [n for where, n in trips.items() if where.endswith("pararnn_iterations/while")]
    assert 0 <= inside <= jax.jit(programs["stats"].function)(*programs["stats"].args).iterations


# --- figures ----------------------------------------------------------------------------------


class Sizes:
    temp_size_in_bytes = 100


def report(loops=()):
    resources = [{"kernel": "a", "regs": 32, "spill_stores": 0}, {"kernel": "b", "regs": 64}]
    block = Block(10, 5, 4_300_000, [*loops])
    return Report(seconds=2.0, memory=Sizes(), program=block, resources=resources)


def test_the_predicted_time():
    found = _counts.counts(report(), {})
    assert found["predicted_seconds"] == pytest.approx(5 * 4e-6 + 1e-6)
    assert found["registers"] == 64 and found["spilled_bytes"] == 0
    loop = Loop("while.1", "a/pararnn_finish/while", None, Block(1, 1), Block(1, 1))
    found = _counts.counts(report([loop]), {"pararnn_finish/while": 2})
    assert found["loops"] == {"pararnn_finish/while": 2} and found["reads"] == 3
    assert found["predicted_seconds"] == pytest.approx(10 * 4e-6 + 3 * 15e-6 + 1e-6)


def test_unknown_trips_give_unknown_counts():
    loop = Loop("while.1", "jit(f)/while", None, Block(1, 1), Block(1, 1))
    found = _counts.counts(report([loop]), {})
    assert found["device_ops"] is None and found["predicted_seconds"] is None
    assert found["temporary_bytes"] == 100
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def content(solver="choice", measured=False, **changed):
    figures = _counts.counts(report(), {}) | changed
    record = {**Case("DiagonalGRU", 64, 1024, solver)._asdict(), "forward": figures}
    return {
        "environment": {"chip": "H", "jax": "1", "date": "today", "measured": measured},
        "cases": {solver: record},
    }


def test_tables_say_what_was_measured():
    def both(measured, ours, scans):
        scan = content(_cases.SCAN, measured, predicted_seconds=1.0, **scans)
        found = content("choice", measured, predicted_seconds=0.001, **ours)
        return found | {"cases": found["cases"] | scan["cases"]}

    text = _gpu_tables.table(both(False, {}, {}))
    assert text.startswith(_gpu_tables.NOT_MEASURED) and "measured / ms" not in text
    assert "| 1 | 1,000 |" in text
    found = both(True, {"seconds": [0.005, 0.004, 0.006]}, {"seconds": [0.5, 0.4, 0.6]})
    text = _gpu_tables.table(found)
    assert _gpu_tables.NOT_MEASURED not in text and "| 1 | 1,000 | 5 | 100 |" in text
    assert "| ? |" in _gpu_tables.table(content(predicted_seconds=None))
    assert [*_gpu_tables.panels(found)["forward"]] == [_cases.SCAN, "choice"]


def test_what_has_grown_is_told():
    before = content()
    assert _counts.grown(before, content(submissions=5, temporary_bytes=109)) == []
    for changed in ({"submissions": 6}, {"device_ops": None}, {"temporary_bytes": 111}):
        (complaint,) = _counts.grown(before, content(**changed))
        assert next(iter(changed)) in complaint
    assert "no committed counts" in _counts.grown(before, content("Newton(1)"))[0]


# --- for real ---------------------------------------------------------------------------------


def interpreter():
    """One that has the extra `gpu-check`: this one, or that of `make gpu-check`."""
    if importlib.util.find_spec("jax_cuda12_plugin") is not None:
        return sys.executable
    found = ROOT / ".venv-gpu" / "bin" / "python"
    return str(found) if (found.parents[1] / ".installed").exists() else None


@pytest.mark.slow
@pytest.mark.skipif(interpreter() is None, reason="needs the extra `gpu-check`: make gpu-check")
def test_no_program_of_a_gpu_takes_more_than_before():
    """If it does on purpose: `make gpu-check ARGS=--fresh`, and commit the file."""
    # In a process of its own: what compiles for a GPU must be set up before JAX is.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    run = subprocess.run(
        [str(interpreter()), "-m", "tools.gpu_counts", "--quick", "--check"],
        cwd=ROOT,
        env={**env, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    if "not compared" in run.stdout:
        pytest.skip(run.stdout.splitlines()[-1])
    assert "no count has grown" in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="nothing is missing here"
)
def test_what_is_missing_is_told():
    run = subprocess.run(
        [sys.executable, "-m", "tools.gpu_counts", "--quick"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "`make gpu-check`" in run.stderr


def test_float32_is_what_is_counted():
    program = _cases.programs(Case("M2RNN, 4 heads", 8, 16, "choice", ("forward",)), None)
    arrays, inputs = program["forward"].args
    assert {x.dtype for x in jax.tree.leaves((arrays, inputs))} == {jnp.dtype("float32")}


# --- collectives ------------------------------------------------------------------------------

EXCHANGES = """HloModule jit_f

body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %moved = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1}}
  ROOT %t = (s32[], f32[8]) tuple(%i, %moved)
}

test (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %most = s32[] all-reduce(%i), to_apply=%larger
  ROOT %less = pred[] compare(%most, %most), direction=LT
}

larger (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %m = s32[] maximum(%a, %b)
}

ENTRY %main (x: f32[8]) -> f32[2,8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %x)
  %loop = (s32[], f32[8]) while(%start), condition=%test, body=%body, metadata={op_name="jit(f)/pararnn_iterations/while"}
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  %begun = (f32[8]{0}, f32[2,8]{1,0}) all-gather-start(%y), dimensions={0}
  ROOT %all = f32[2,8]{1,0} all-gather-done(%begun)
}
"""  # noqa: E501


def test_collectives_are_found_where_they_stand():
    assert collectives(EXCHANGES) == [
        Collective("all-gather", 32, ()),
        Collective("collective-permute", 32, ("iterations",)),
        Collective("all-reduce", 4, ("iterations?",)),
    ]
