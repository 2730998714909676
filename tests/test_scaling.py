"""The benchmark of several devices: what is counted, and the model made of it."""

import pytest

from benchmarks import _scaling, _sharded_parts
from benchmarks._collectives import Collective, collectives
from benchmarks._scaling import Network
from benchmarks._several import on_devices

HLO = """HloModule jit_f

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
  %loop = (s32[], f32[8]) while(%start), condition=%test, body=%body, metadata={op_name="jit(f)/pararnn_attempts/while"}
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  %begun = (f32[8]{0}, f32[2,8]{1,0}) all-gather-start(%y), dimensions={0}
  ROOT %all = f32[2,8]{1,0} all-gather-done(%begun)
}
"""  # noqa: E501


def test_collectives_are_found_where_they_stand():
    assert collectives(HLO) == [
        Collective("all-gather", 32, ()),
        Collective("collective-permute", 32, ("attempts",)),
        Collective("all-reduce", 4, ("attempts?",)),
    ]


def test_only_what_turns_is_exchanged():
    found = [
        {"kind": "all-reduce", "nbytes": 8, "loops": [], "count": 2},
        {"kind": "all-gather", "nbytes": 4, "loops": ["attempts", "iterations"], "count": 3},
        {"kind": "all-gather", "nbytes": 4, "loops": ["rest", "attempts"], "count": 5},
    ]
    assert _scaling.exchanges(found, _scaling.turns(iterations=4)) == [
        ("all-reduce", 8, 2),
        ("all-gather", 4, 12),
    ]


def test_the_model_by_hand():
    network = Network(latency=1e-3, bandwidth=1e6)
    exchange = _scaling.seconds_of_exchange
    assert exchange("collective-permute", 1000, 8, network) == pytest.approx(2e-3)
    assert exchange("all-reduce", 1000, 8, network) == pytest.approx(3 * 2e-3)
    assert exchange("all-gather", 1000, 8, network) == pytest.approx(3e-3 + 7e-3)
    assert exchange("all-gather", 1000, 1, network) == 0
    made = [("all-reduce", 1000, 2)]
    # 1,000 steps and 384 more, of 1 ms each, and two exchanges.
    assert _scaling.seconds(1e-3, 8000, 8, network, made) == pytest.approx(1.384 + 2 * 6e-3)
    assert _scaling.speed_up(1e-3, 8000, 1, network, made) == 1
    near = Network(0.0, 1e30)
    assert _scaling.speed_up(1e-3, 1 << 30, 64, near, made) == pytest.approx(64, rel=1e-4)


@pytest.mark.slow
def test_a_part_runs_on_devices_of_its_own():
    case = {"cell": "Elman", "size": 4, "length": 512, "solver": "Newton"}
    found = on_devices(2, _sharded_parts.agreement, dtype="float32", **case)
    assert found["value error"] <= 1e-5 and found["gradient error"] <= 1e-4
    assert found["iterations"] > 0 and not found["finished sequentially"]
