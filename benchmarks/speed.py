"""How fast are the solvers, against the jitted `lax.scan` of the same cell?

Measures forward, and forward and gradient together, in turns with the scan (A B A B …): median and
quartiles, compile time, temporary memory, iterations, critical path and errors; also the machine's
bandwidth for copies, of which the least traffic (inputs read once, states written once) is a
fraction. Without options it measures the cases of this machine's preset, the most important first.
Results go to a JSON file after each case; the same call continues an interrupted one.
"""

import argparse
import datetime
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import pararnn as prnn
from pararnn.diagnostics import scan_states

from ._measure import Results, Row, Spread, compare, interleaved, markdown, parser, spread
from ._solvers import NO_KERNELS, parse_solver, settings
from ._systems import CELLS, HEADS, VARIANTS, scanned, solved

EQUINOX = "equinox"
DEFAULT = "default against lax.scan"


class Case(NamedTuple):
    """A cell and its inputs, and the solvers to compare with `lax.scan`.

    - `question`: why it is measured.
    - `cell`, `length`, `batch`, `size`, `dtype`: the problem; `size` is that of inputs and states.
    - `solvers`: see `settings`; `equinox` is the cell of Equinox in a scan, which projects one
        input at a time.
    - `project`: whether the input projection is measured too.
    - `gradient`, `costs`: whether to measure forward and gradient too; to count operations.
    - `outputs`: whether to measure the outputs of a layer, projection and readout included, which
        may need no states; otherwise all states.
    """

    question: str
    cell: str
    length: int
    batch: int = 1
    size: int = 32
    dtype: str = "float32"
    solvers: tuple[str, ...] = ("default",)
    project: bool = False
    gradient: bool = True
    costs: bool = False
    outputs: bool = False

    def key(self) -> str:
        text = f"{self.cell} L={self.length} B={self.batch} D={self.size} {self.dtype}"
        options = ("project", "gradient", "costs", "outputs")
        chosen = [option for option in options if getattr(self, option)]
        return " ".join([text, *chosen, *self.solvers])


# --- a case -----------------------------------------------------------------------------------


def measure(case: Case, *, repetitions: int, limit: float, title: str | None) -> Row:
    """The rows of `compare` for a case, and the bytes that it must move at least."""
    dtype = jnp.dtype(case.dtype)
    key_cell, key_x = jax.random.split(jax.random.key(0))
    cell = (CELLS | VARIANTS)[case.cell](case.size, dtype=dtype, key=key_cell)
    features: tuple[int, ...] = (case.size,)
    if isinstance(cell, (prnn.ConvLSTM, prnn.ConvS5)):
        features = cell.input_channels, *cell.image_shape
    # Time comes first, then the batch: the layout that a scan takes without transposing.
    shape = (case.length, case.batch) if case.batch > 1 else (case.length,)
    xs = jax.random.normal(key_x, (*shape, *features), dtype)

    def over_batch(function):
        if case.batch == 1:
            return function
        return lambda cell, xs: jax.vmap(lambda x: function(cell, x), 1, (1, 0))(xs)

    @over_batch
    def project(cell, xs):
        return cell.project(xs), None

    raw = case.project or case.outputs
    inputs = xs if raw else eqx.filter_jit(project)(cell, xs)[0]

    def projected(states_of):
        return lambda cell, xs: states_of(cell, cell.project(xs) if case.project else xs)

    runs = {"lax.scan": over_batch(_read_scan if case.outputs else projected(scanned))}
    for name in case.solvers:
        if case.outputs:
            run = _outputs(name)
        elif name == EQUINOX:
            run = _equinox
        else:
            one = jax.ShapeDtypeStruct((case.length, *features), dtype)
            run = projected(_solve(*settings(name, cell, one)))
        runs[name] = over_batch(run)
    rows = compare(
        runs,
        (cell, inputs),
        gradient=case.gradient,
        repetitions=repetitions,
        limit=limit,
        costs=case.costs,
        title=title,
    )
    states = eqx.filter_eval_shape(runs["lax.scan"], cell, inputs)[0]
    read, written = (
        sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree)) for tree in (inputs, states)
    )
    return {
        "floor_bytes": {"forward": read + written, "gradient": 2 * read + written},
        "rows": rows,
    }


def _solve(solver, adjoint):
    return lambda cell, us: solved(cell, us, solver, adjoint)


def _read_scan(cell, xs):
    """The outputs by `lax.scan`, which stores all states."""
    us = cell.project(xs)
    return cell.readout(scanned(cell, us)[0], us), None


def _outputs(name):
    solver = parse_solver(name)
    return lambda cell, xs: (
        prnn.RNN(cell, solver=solver, adjoint=solver)(xs, throw=False)[0],
        None,
    )


def _equinox(cell, xs):
    """Equinox's cell with the same weights, as its users put it in a scan."""
    lstm = isinstance(cell, prnn.LSTM)
    make = eqx.nn.LSTMCell if lstm else eqx.nn.GRUCell
    theirs = make(cell.input_size, cell.hidden_size, key=jax.random.key(0))
    theirs = eqx.tree_at(
        lambda c: (c.weight_ih, c.weight_hh, c.bias),
        theirs,
        (cell.weight_x, cell.weight_h, cell.bias),
    )
    if lstm:
        c, h = cell.init_state()
        h, c = scan_states(lambda state, x: theirs(x, state), xs, (h, c))
        return (c, h), None
    theirs = eqx.tree_at(lambda c: c.bias_n, theirs, cell.bias_n)
    return scan_states(lambda state, x: theirs(x, state), xs, cell.init_state()), None


def copy_bandwidth(megabytes: int) -> Row:
    """Bytes per second, read and written, of `x + 1` on an array of float32."""
    x = jnp.zeros(megabytes * 250_000, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = interleaved({"copy": lambda: copy(x)}, 15)["copy"]
    return {"megabytes": megabytes, "bytes_per_second": spread([2 * x.nbytes / s for s in seconds])}


# --- presets, the most important cases first --------------------------------------------------

_FAST = ("GRU", "DiagonalGRU", "Elman", "DiagonalLSTM")


def preset(platform: str) -> Iterator[Case]:
    """All cases of `"cpu"` or `"gpu"`, in order."""
    yield from (_gpu if platform == "gpu" else _cpu)()


def _cpu():
    for length in (4096, 65_536, 16_384, 1024):
        for cell in _FAST:
            yield Case(DEFAULT, cell, length)
    for cell in ("GRU", "LSTM"):
        yield Case(DEFAULT, cell, 4096, solvers=("default", EQUINOX), project=True)
    for cell in CELLS:
        if cell not in _FAST:
            yield Case(DEFAULT, cell, 4096)
    chunks = {
        "DiagonalGRU": ("Newton(1)", "Newton(64)", "Jacobi(64)", "Jacobi(256)"),
        "GRU": ("Newton(64)", "Jacobi(64)", "Jacobi(256)"),
    }
    for length in (4096, 1024, 16_384, 65_536):
        for cell, solvers in chunks.items():
            yield Case("chunk sizes", cell, length, solvers=solvers)
        if length < 65_536:
            # One sequence of 32 units is measured above.
            for batch, size in ((8, 32), (64, 32), (1, 128), (8, 128), (64, 128)):
                for cell in chunks:
                    yield Case("batch sizes", cell, length, batch, size)
    yield Case("memory floor", "DiagonalGRU", 16_384, size=1024, gradient=False)


def _gpu():
    recurrent = ("DiagonalGRU", "GRU, forgets", "DiagonalLSTM")
    for cell in recurrent:
        yield Case(DEFAULT, cell, 65_536, size=64, solvers=("default", "default-kernels"))
    for length, cell in itertools.product((4096, 65_536), HEADS):
        yield Case("outputs of layers", cell, length, size=128, outputs=True)
    for cell in recurrent[:2]:
        solvers = tuple(f"Newton({n})" for n in (16, 32, 64, 128))
        yield Case("chunk sizes", cell, 65_536, size=64, solvers=solvers)
        for batch in (256, 16):
            yield Case("batch sizes", cell, 4096, batch, 64, solvers=("default", "Sequential"))
        for size, length in ((64, 4096), (1024, 4096), (64, 1024), (64, 262_144)):
            yield Case(DEFAULT, cell, length, size=size)
    for cell in CELLS:
        if cell not in recurrent:
            yield Case(DEFAULT, cell, 4096, size=64)


# --- the command ------------------------------------------------------------------------------


def run(cases: list[Case], results: Results, *, repetitions, limit, budget) -> None:
    """Measures the cases that are not in `results` yet; starts none after `budget` seconds."""
    begin = time.perf_counter()
    if "copy" not in results.content:
        results.put("copy", copy_bandwidth(100 if jax.default_backend() == "cpu" else 1000))
    for i, case in enumerate(cases):
        records = results.content.setdefault("cases", {})
        if case.key() in records:
            continue
        start = time.perf_counter()
        if start - begin > budget:
            print(f"{budget:g} seconds are over; call again to continue.")
            return
        print(f"[{i + 1}/{len(cases)}] {case.question}: {case.key()}", flush=True)
        load = os.getloadavg()[0]
        measured = measure(case, repetitions=repetitions, limit=limit, title=case.cell)
        date, seconds = datetime.date.today().isoformat(), time.perf_counter() - start
        record = {"date": date, **case._asdict(), "load": load, "seconds": seconds, **measured}
        results.put("cases", records | {case.key(): record})


def table(content: dict[str, Any], keys: list[str]) -> str:
    """Times in milliseconds, relative to the scan, and relative to the memory floor."""
    rows, cases = [], content.get("cases", {})
    for record in (cases[key] for key in keys if key in cases):
        bandwidth = content["copy"]["bytes_per_second"][0]
        for row in record["rows"]:
            line = {name: record[name] for name in ("cell", "length", "batch", "size", "dtype")}
            line["solver"] = row["name"]
            for kind in ("forward", "gradient"):
                measured = row.get(kind)
                line[f"{kind} / ms"] = 1e3 * measured["seconds"][0] if measured else ""
                line[f"{kind} / scan"] = Spread(*measured["ratio"]) if measured else ""
                floor = record["floor_bytes"][kind] / bandwidth
                line[f"{kind} / floor"] = measured["seconds"][0] / floor if measured else ""
            line["iterations"] = row.get("iterations", "")
            line["steps"] = row.get("sequential_steps", "")
            line["error"] = row["error"]
            rows.append(line)
    return markdown(rows) if rows else "nothing measured"


def main(argv: list[str] | None = None) -> None:
    command = parser("speed", __doc__)
    add = command.add_argument
    add("--budget", type=float, default=float("inf"), help="seconds after which no case starts")
    add("--cells", nargs="+", choices=CELLS | VARIANTS, help="with these options, no preset")
    add("--lengths", nargs="+", type=int)
    add("--batches", nargs="+", type=int)
    add("--widths", nargs="+", type=int)
    add("--dtypes", nargs="+", choices=("bfloat16", "float32", "float64"))
    add("--solvers", nargs="+", help="like default, Newton-kernels, Jacobi(64), equinox")
    add("--project", action="store_true", help="with the input projection")
    add("--forward", action="store_true", help="without gradients")
    add("--repetitions", type=int, default=15)
    add("--limit", type=float, default=3.0, help="seconds of timing per table")
    add("--fresh", action="store_true", help="discard earlier results")
    args = command.parse_args(argv)
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    own = any((args.cells, args.lengths, args.batches, args.widths, args.dtypes, args.solvers))
    cases = _chosen(args) if own else list(preset(platform))
    if args.dtypes and "float64" in args.dtypes:
        jax.config.update("jax_enable_x64", True)
    results = Results(args.output / f"speed-{platform}.json", args.fresh)
    try:
        limits = {"limit": args.limit, "budget": args.budget}
        run(cases, results, repetitions=args.repetitions, **limits)
    except KeyboardInterrupt:
        print("stopped: the same call continues where it was")
        raise SystemExit(130) from None
    finally:
        print(f"\n{table(results.content, [case.key() for case in cases])}\n\nin {results.path}")


def _chosen(args: argparse.Namespace) -> list[Case]:
    solvers = tuple(args.solvers or ("default",))
    for solver in solvers:
        if solver != EQUINOX:
            parse_solver(solver.removesuffix(NO_KERNELS))  # raises before anything is measured
    sizes = itertools.product(
        args.cells or ("GRU", "DiagonalGRU"),
        args.lengths or (4096,),
        args.batches or (1,),
        args.widths or (32,),
        args.dtypes or ("float32",),
    )
    return [Case("chosen", *size, solvers, args.project, not args.forward) for size in sizes]
