"""A change that makes a solve dearer is seen here, without a clock."""

import json

import jax
import pytest

from benchmarks import counts

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the committed counts are those of a CPU"
)


@pytest.mark.parametrize("case", counts.CASES, ids=lambda case: case.cell)
def test_no_solve_takes_more_than_before(case):
    """If it does on purpose: `python -m benchmarks counts`, and commit the file."""
    committed = json.loads(counts.PATH.read_text())[case.key()]
    found = counts.counts(case)
    assert found.keys() == committed.keys()
    scan, committed_scan = found.pop("lax.scan"), committed.pop("lax.scan")
    for solver, numbers in found.items():
        for name, number in numbers.items():
            limit = committed[solver][name] * counts.slack(name)
            # What another release of JAX counts otherwise, it counts otherwise in the scan, too.
            if name.endswith(("flops", "bytes")) and not name.endswith("temporary_bytes"):
                limit *= max(1.0, scan[name] / committed_scan[name])
            assert number <= limit, f"{solver}: {name} was {committed[solver][name]}, is {number}"
