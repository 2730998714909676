"""A change that makes a solve dearer is seen here, without a clock."""

import json

import jax
import pytest

from benchmarks import counts

pytestmark = [
    pytest.mark.usefixtures("optimised"),
    pytest.mark.skipif(
        jax.default_backend() != "cpu", reason="the committed counts are those of a CPU"
    ),
]


@pytest.mark.parametrize("case", counts.CASES, ids=lambda case: case.cell)
def test_no_solve_takes_more_than_before(case):
    """If it does on purpose: `python -m benchmarks counts`, and commit the file."""
    content = json.loads(counts.PATH.read_text())
    committed = content[case.key()]
    found = counts.counts(case)
    assert found.keys() == committed.keys()
    same_release = content["environment"]["jax"] == jax.__version__
    for solver, numbers in found.items():
        for name, number in numbers.items():
            limit = committed[solver][name] * counts.slack(name)
            if not same_release and name.endswith((" flops", " bytes")):
                # What another release counts otherwise, it counts otherwise in the scan, too.
                limit *= max(1.0, found["lax.scan"][name] / committed["lax.scan"][name])
            assert number <= limit, f"{solver}: {name} was {committed[solver][name]}, is {number}"
