"""Numbers and lists that stand in prose are those of the code, or of the file of a result.

Each entry is a file, what it says with a place for each number, and where the numbers come from.
Tables between markers are kept by `test_report.py`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import pararnn as prnn
from examples.tasks import TASKS
from pararnn import _select
from pararnn._norms import default_rtol
from pararnn.adjoints import _one_pass
from pararnn.solvers import _convergence, _elementwise, _speculative, _time_sharded, _verdict
from tools.gpu_counts import _counts

ROOT = pathlib.Path(__file__).parents[1]
SOLVER = "pararnn/solvers/_shooting.py"
WORDS = {8: "eight", 9: "nine", 11: "eleven", 15: "fifteen"}


@functools.cache
def text_of(file: str) -> str:
    """A file in one line, so that it does not matter where lines are broken."""
    return " ".join((ROOT / file).read_text().split())


@functools.cache
def results(file: str):
    return json.loads((ROOT / file).read_text())


def short(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}g}".replace("e-0", "e-")


# --- where the numbers come from --------------------------------------------------------------


@functools.cache
def on_gpu(heads: int, size: int, kernels: bool) -> prnn.Newton:
    """What `Newton()` is on a GPU, for a network of `heads` independent parts of `size` units."""
    weights = jnp.ones((heads, size, size), jnp.float32)

    def step(h, x):
        return jnp.tanh(jnp.einsum("hij,hj->hi", weights, h) + x)

    xs, init = (jax.ShapeDtypeStruct((*n, heads, size), jnp.float32) for n in ((4096,), ()))
    recurrence = prnn.Recurrence(step, xs, init)
    with mock.patch.dict(os.environ, PARARNN_KERNELS=str(int(kernels))):
        return prnn.Newton().resolved(recurrence, "gpu")


def in_kernels() -> int:
    return on_gpu(3, 1, True).chunk_size


def written_out() -> int:
    return on_gpu(3, 1, False).chunk_size


def overlap() -> int:
    return on_gpu(1, 8, True).overlap


@functools.cache
def few_tangents() -> int:
    """The most tangents for which chunks that are written out are as much shorter."""
    sizes = range(1, 10)
    return max(n for n in sizes if on_gpu(2, n, False).chunk_size == written_out() // n)


def min_iters() -> tuple[int, int, int]:
    few = few_tangents()
    return on_gpu(2, few, True).min_iters, on_gpu(2, few + 1, True).min_iters, few


def bounds(solver) -> tuple[int, int]:
    """The smallest and the largest default chunk size."""
    return tuple(solver.default_chunk_size(prnn.Dense(), n, 4) for n in (1, 10**9))


def rtols() -> tuple[str, str]:
    return short(default_rtol(jnp.float32)), short(default_rtol(jnp.float64))


def fields() -> tuple[str]:
    """What iterative solvers share, as a sentence has it."""
    *names, last = (f"`{f.name}`" for f in dataclasses.fields(prnn.solvers.AbstractIterativeSolver))
    return (f"{', '.join(names)} and {last}",)


def concrete(room, base: type) -> dict[str, type]:
    found = {k: v for k, v in vars(room).items() if isinstance(v, type) and issubclass(v, base)}
    return {k: v for k, v in found.items() if not k.startswith("Abstract")}


def solvers() -> tuple[str]:
    """How many methods there are; `TimeSharded` runs any of them."""
    return (WORDS[len(concrete(prnn.solvers, prnn.AbstractSolver)) - 1],)


def measured(kind: str) -> tuple[float, float]:
    """Milliseconds of a diagonal GRU on a GPU: ours, the scan's."""
    rows = results("benchmarks/results/h200.json")["programs"]
    wanted = {"cell": "DiagonalGRU", "length": 65_536, "batch": 1, "kind": kind}
    found = {r["solver"]: 1e3 * r["seconds"][0] for r in rows if wanted.items() <= r.items()}
    return found["choice"], found["lax.scan"]


def submissions(case: str) -> int:
    cases = results("benchmarks/results/gpu.json")["cases"]
    return cases[f"{case} D=64 L=65536 lax.scan"]["forward"]["submissions"]


def model() -> tuple[float, float, float]:
    return (
        1e6 * _counts.SUBMISSION_SECONDS,
        1e6 * _counts.READ_SECONDS,
        _counts.BYTES_PER_SECOND / 1e12,
    )


def sharded_memory() -> tuple[int, float, float]:
    """Steps; megabytes on each of eight devices, and on one."""
    found = results("benchmarks/results/sharded.json")["long"]
    return found["length"], *(sum(found["bytes"][n].values()) / 1e6 for n in ("8", "1"))


def temporary_memory() -> tuple[float]:
    """Of forward and gradient on a CPU, percent of the scan's."""
    cases = results("benchmarks/results/speed-cpu.json")["cases"]
    scan, ours = cases["GRU L=4096 B=1 D=32 float32 gradient default"]["rows"]
    return (100 * ours["gradient"]["temporary_bytes"] / scan["gradient"]["temporary_bytes"],)


def agreement() -> tuple[str, str]:
    """The largest errors of values."""
    rows = results("benchmarks/results/agreement.json")["errors"]
    worst = {r["dtype"]: 0.0 for r in rows}
    for row in rows:
        worst[row["dtype"]] = max(worst[row["dtype"]], row["value error"])
    return short(worst["float32"], 1), short(worst["float64"], 1)


def families() -> tuple[str]:
    return (WORDS[len(results("benchmarks/results/random_systems.json")["families"])],)


def random_systems() -> tuple[int]:
    found = results("benchmarks/results/random_systems.json")["families"].values()
    return (sum(family["systems"] for family in found),)


def steps_of(group: str, length: int, names: str) -> tuple[str]:
    """What some solvers all take for a word problem."""
    rows = results("benchmarks/results/state_tracking.json")["solving"]
    (one,) = {
        f"{row['steps']:,}{', finished sequentially' * row['finished sequentially']}"
        for row in rows
        if (row["group"], row["L"]) == (group, length) and row["solver"] in names.split(", ")
    }
    return (one,)


def accuracy(table: str, cell: str, *lengths: str) -> tuple[float, ...]:
    """Of a model, in percent."""
    rows = results(f"examples/results/{table}.json")["rows"]
    (found,) = (r["accuracy"] for r in rows if r["options"]["cell"] == cell)
    return tuple(100 * found[n] for n in lengths)


def of_hops() -> tuple[float, ...]:
    """Of the models of k-hop, in percent."""
    rows = results("examples/results/synthetic.json")["rows"]
    return tuple(100 * r["accuracy"]["accuracy"] for r in rows if r["options"]["task"] == "k-hop")


def cells_compared() -> tuple[int]:
    return (len(results("examples/results/cells.json")["rows"]),)


def memory(*networks: str):
    """The fewest and the most steps of each."""
    steps = results("benchmarks/results/trained.json")["memory"]
    return [bound(steps[name]) for name in networks for bound in (min, max)]


GATED = ("gru", "gru_early", "lstm")


def through_gates(after: int, key: str, networks: tuple[str, ...] = GATED) -> list[float]:
    rows = results("benchmarks/results/trained.json")["gates"]
    return [
        r[key] for name in networks for r in rows if (r["network"], r["steps"]) == (name, after)
    ]


def elementwise(key: str, length: int = 16_384, networks: tuple[str, ...] = GATED) -> list[Any]:
    """Of sweeps over chunks of 16 steps."""
    rows = results("benchmarks/results/trained.json")["sweeps"]
    wanted = {"method": "ElementwiseNewton", "chunk": 16, "L": length}
    return [
        r[key]
        for name in networks
        for r in rows
        if (wanted | {"network": name}).items() <= r.items()
    ]


def swept(network: str, chunk_size: int, method: str) -> int:
    """Iterations at L = 1,024."""
    rows = results("benchmarks/results/trained.json")["sweeps"]
    wanted = {"network": network, "L": 1024, "method": method, "chunk": chunk_size}
    (found,) = (row["iterations"] for row in rows if wanted.items() <= row.items())
    return found


def worst() -> list[float]:
    """The largest ratios of errors at L = 16,384, of states and of derivatives."""
    names = (*GATED, "elman")
    keys = [
        ("error", "error of the scan"),
        ("error of the derivative", "error of the scan's derivative"),
    ]
    return [
        max(a / b for a, b in zip(*(elementwise(k, networks=names) for k in pair), strict=True))
        for pair in keys
    ]


def long_texts():
    """Iterations of Newton's method and of Jacobi's, and the largest ratio of errors."""
    rows = results("benchmarks/results/trained.json")["long"]
    assert not any(row["finished sequentially"] for row in rows)
    (length,) = {row["L"] for row in rows}
    found = [length]
    for method in ("Newton", "Jacobi"):
        counts = [row["iterations"] for row in rows if row["method"] == method]
        (chunk_size,) = {row["chunk"] for row in rows if row["method"] == method}
        found += [min(counts), max(counts), chunk_size]
    return *found, max(row["error"] / row["error of the scan"] for row in rows)


# --- what is said -----------------------------------------------------------------------------

SAID = [
    # The defaults of a GPU.
    ("docs/accelerators.md", "chunks of {} steps, which are written", lambda: [written_out()]),
    ("docs/accelerators.md", "or of {} in a [kernel of our own]", lambda: [in_kernels()]),
    ("docs/accelerators.md", "({}, or {} if a sweep pushes more than {} tangents)", min_iters),
    ("docs/accelerators.md", "early instead (`overlap`, {} steps)", lambda: [overlap()]),
    ("docs/accelerators.md", "within the {} steps by which chunks start", lambda: [overlap()]),
    ("docs/faq.md", "chunks of {} steps are written out", lambda: [written_out()]),
    (
        "benchmarks/README.md",
        "chunks of {} steps in a kernel, or of {} without kernels (divided by the number of "
        "tangents, if that is at most {}). Where the Jacobian is dense they start {} steps early",
        lambda: [in_kernels(), written_out(), few_tangents(), overlap()],
    ),
    (
        "pararnn/solvers/_newton.py",
        "accelerator it is {} in kernels; otherwise {}, divided by the number of tangents if that "
        "is at most {}.",
        lambda: [in_kernels(), written_out(), few_tangents()],
    ),
    (SOLVER, "`min({}, chunk_size)` on an accelerator", lambda: [overlap()]),
    (SOLVER, "elsewhere {}, or {} if a sweep pushes more than {} tangents", min_iters),
    *(
        (file, text, from_trained)
        for file in ("README.md", "docs/speed.md")
        for text, from_trained in (
            ("remembers a disturbance for {} to {} steps, until", lambda: memory("gru")),
            ("GRUs and LSTMs of more than {} state elements", lambda: [_select._MIN_MIXED_SIZE]),
            (
                "Over chunks of 16 steps it takes {} iterations at L = 16,384, and {} for the",
                lambda: [elementwise(key)[0] for key in ("iterations", "derivative")],
            ),
        )
    ),
    (
        "docs/trained_networks.md",
        "after {} to {} steps in `gru`, {} to {:,} in `gru_early`, {} to {:,} in `lstm`, and {} to "
        "{} in `elman`",
        lambda: memory(*GATED, "elman"),
    ),
    (
        "docs/trained_networks.md",
        "have {:.1f} to {:.1f} above 0.1 after 64 steps",
        lambda: [bound(through_gates(64, "above 0.1")) for bound in (min, max)],
    ),
    (
        "docs/trained_networks.md",
        "explain {:.0f} % in `gru_early` and {:.0f} % in `lstm`. In `gru`, trained for longer, it "
        "is only {:.0f} %",
        lambda: [100 * x for x in through_gates(64, "explained", ("gru_early", "lstm", "gru"))],
    ),
    (
        "docs/trained_networks.md",
        "After 16 steps they miss {:.2g}, {:.2g} and {:.2g} of",
        lambda: through_gates(16, "missed"),
    ),
    (
        "docs/trained_networks.md",
        "a dense cell of more than {} state elements",
        lambda: [_select._MIN_MIXED_SIZE],
    ),
    (
        "docs/trained_networks.md",
        "it is {} at L = 1,024 and {} at 16,384 in `gru`, {} and {} in `gru_early`, and {} and {} "
        "in `lstm`",
        lambda: [
            elementwise("iterations", length, (name,))[0]
            for name in GATED
            for length in (1024, 16_384)
        ],
    ),
    ("docs/trained_networks.md", "at most {:.1f} times the scan's, and {:.1f} times for", worst),
    (
        "docs/trained_networks.md",
        "it is {} instead of {} for Jacobi's method in `gru_early`, {} instead of {} in `lstm`, "
        "and {} instead of {} in `gru`",
        lambda: [
            swept(name, 16, method)
            for name in ("gru_early", "lstm", "gru")
            for method in ("ElementwiseNewton", "Jacobi")
        ],
    ),
    (
        "docs/trained_networks.md",
        "saved in `gru`: {} and {}.",
        lambda: [swept("gru", 64, method) for method in ("ElementwiseNewton", "Jacobi")],
    ),
    (
        "docs/trained_networks.md",
        "On an accelerator {} iterations are made",
        lambda: [WORDS[_elementwise._MIN_ITERS]],
    ),
    # Other settings.
    ("docs/faq.md", "{} in float32 and {} in float64, for each element", rtols),
    (SOLVER, "({} in float32, {} in float64)", rtols),
    ("docs/choosing_a_solver.md", "Every iterative solver takes {}", fields),
    ("CONTRIBUTING.md", "the fields that solvers share: {}.", fields),
    ("docs/state_tracking.md", "at least {} and at most {}.", lambda: bounds(prnn.Speculative())),
    (
        "pararnn/solvers/_fixed_point.py",
        "but at least {} and at most {}; on an accelerator it is {}.",
        lambda: [*bounds(prnn.Jacobi()), prnn.Jacobi.accelerator_chunk_size],
    ),
    (
        "docs/state_tracking.md",
        "unless the state has more than {} elements",
        lambda: [_speculative._MAX_NEWTON_SIZE],
    ),
    (
        "docs/how_it_works.md",
        "are accepted at L = {:,} after {} to {} iterations of Newton's method over chunks of {} "
        "steps, and after {} to {} of Jacobi's over chunks of {}. The error of the states, against "
        "a run in float64, is at most {:.1f} times",
        long_texts,
    ),
    ("docs/how_it_works.md", "after {} iterations in a row", lambda: [_convergence._PATIENCE]),
    ("docs/how_it_works.md", "at least {} in all, are made", lambda: [_verdict._CHECKED]),
    ("docs/speed.md", "from {} sequences under `jax.vmap` on", lambda: [_one_pass._MANY]),
    ("docs/faq.md", "From {} sequences on, the backward", lambda: [_one_pass._MANY]),
    # Several devices.
    *(
        (file, said, lambda: [_time_sharded.OVERLAP])
        for file, said in (
            ("docs/several_devices.md", "in one pass that starts {} steps early"),
            ("docs/several_devices.md", "On CPUs each device begins {} steps early"),
            ("docs/several_devices.md", "it has not forgotten within {} steps.)"),
            ("pararnn/solvers/_time_sharded.py", "each of which starts {} steps early"),
            ("pararnn/_select.py", "the part of each starts {} steps early"),
        )
    ),
    (
        "docs/long_sequences.md",
        "{:,} steps of a DiagonalGRU took {:.0f} MB on each of eight, instead of {:,.0f} MB on one",
        sharded_memory,
    ),
    # What was measured or counted.
    ("docs/accelerators.md", "is {:,} launches", lambda: [submissions("GRU, forgets")]),
    *(
        (
            file,
            "{:.0f} µs for each submission, {:.0f} µs for each wait, and the moved bytes at {} "
            "TB/s",
            model,
        )
        for file in ("docs/accelerators.md", "benchmarks/README.md")
    ),
    (
        "docs/index.md",
        "took {:.2f} ms where `lax.scan` took {:.0f} ms, and {:.2f} ms where it took {:,.0f}",
        lambda: [*measured("forward"), *measured("gradient")],
    ),
    ("docs/long_sequences.md", "take [{:.0f} % of the temporary", temporary_memory),
    ("docs/faq.md", "errors of values of {} in float32 and {} in float64", agreement),
    ("docs/faq.md", "[Random systems of {} families]", families),
    ("benchmarks/README.md", "Seeded systems of {} families", families),
    ("benchmarks/README.md", "that of the first {:,} of the one seed", random_systems),
    *(
        (
            "docs/state_tracking.md",
            f"| {group} | {length:,} | {names} | {{}} |",
            functools.partial(steps_of, group[:2], length, names.partition(", ch")[0]),
        )
        for group, length, names in (
            ("S3, 6 states", 8192, "Speculative, chunks of 16"),
            ("S3", 8192, "Newton, QuasiNewton, Jacobi"),
            ("S3", 262_144, "Speculative, chunks of 16"),
            ("A5, 60 states", 8192, "Speculative, chunks of 32"),
            ("A5", 8192, "Newton, QuasiNewton, Jacobi"),
        )
    ),
    ("docs/state_tracking.md", "{:.1f} % ([examples]", lambda: accuracy("s3", "lru", "2048")),
    (
        "docs/examples.md",
        "{:.1f} % at 512, {:.1f} % at 2,048; chance",
        lambda: accuracy("s3", "lru", "512", "2048"),
    ),
    ("docs/examples.md", "| 64 | {:.1f} % |", lambda: accuracy("digits", "gru", "held out")),
    ("docs/examples.md", "| {:.1f} %, {:.1f} % |", of_hops),
    ("docs/examples.md", "trains {} cells on the same text", cells_compared),
    ("docs/examples.md", "has {} tasks whose answers are known", lambda: [WORDS[len(TASKS)]]),
    # How many there are.
    ("README.md", "[{} solvers](docs/choosing", lambda: [solvers()[0].capitalize()]),
    ("docs/index.md", "[{} in all, and how to choose]", solvers),
    ("docs/state_of_the_art.md", "| {}, [here](choosing_a_solver.md) |", solvers),
]


@pytest.mark.parametrize(("file", "said", "numbers"), SAID)
def test_numbers_in_prose(file, said, numbers):
    assert said.format(*numbers()) in text_of(file)


def cells_named(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) & concrete(prnn.cells, prnn.AbstractCell).keys()


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("docs/cells.md", "is named, `RNN` makes the outputs of", "chunk by chunk"),
        ("docs/long_sequences.md", "a form in products of matrices", "no solver, adjoint"),
    ],
)
def test_cells_that_go_through_chunks_are_listed(file, before, after):
    text = text_of(file)
    start = text.index(before)
    chunked = set(concrete(prnn.cells, prnn.cells.AbstractChunkedCell))
    assert len(chunked) > 5
    assert cells_named(text[start : text.index(after, start)]) == chunked


@pytest.mark.parametrize("file", ["README.md", "docs/index.md"])
def test_more_than_thirty_cells(file):
    assert "[More than thirty cells](" in text_of(file)
    assert 30 < len(concrete(prnn.cells, prnn.AbstractCell)) < 40
