"""What `benchmarks speed` can measure: cells, sizes, solvers, and the questions of each preset."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import pararnn as prnn
from pararnn.diagnostics import scan_states, select_adjoint, select_solver
from pararnn.diagnostics._compare import compare


def _channels(size: int) -> int:
    return max(size // 16, 1)


# From a size, the number of state elements, to a cell whose inputs have as many features. For S4D
# and SelectiveSSM it is the number of rows of the state, a matrix; of cells of images, the numbers
# of an image of 4 × 4 pixels.
CELLS: dict[str, Callable[..., prnn.AbstractCell]] = {
    "Elman": lambda size, **kw: prnn.Elman(size, size, **kw),
    "GRU": lambda size, **kw: prnn.GRU(size, size, **kw),
    "DiagonalGRU": lambda size, **kw: prnn.DiagonalGRU(size, size, **kw),
    "LSTM": lambda size, **kw: prnn.LSTM(size, size, **kw),
    "DiagonalLSTM": lambda size, **kw: prnn.DiagonalLSTM(size, size, **kw),
    "SLSTM": lambda size, **kw: prnn.SLSTM(size, size, **kw),
    "MinMax": lambda size, **kw: prnn.MinMax(size, size, **kw),
    "LRU": lambda size, **kw: prnn.LRU(size, size, **kw),
    "PiecewiseLinearRNN": lambda size, **kw: prnn.PiecewiseLinearRNN(size, size, **kw),
    "M2RNN": lambda size, **kw: prnn.M2RNN(size, 1, 4, size // 4, **kw),
    "DeltaNet": lambda size, **kw: prnn.DeltaNet(size, 1, 4, size // 4, **kw),
    "DeltaProduct": lambda size, **kw: prnn.DeltaProduct(size, 1, 4, size // 4, **kw),
    "TTTLinear": lambda size, **kw: prnn.TTTLinear(size, 1, 4, size // 4, **kw),
    "Aaren": lambda size, **kw: prnn.Aaren(size, 2, size // 4, size // 2 - 2, **kw),
    "S5": lambda size, **kw: prnn.S5(size, size, **kw),
    "S4D": lambda size, **kw: prnn.S4D(size, **kw),
    "RGLRU": lambda size, **kw: prnn.RGLRU(size, **kw),
    "MinGRU": lambda size, **kw: prnn.MinGRU(size, size, **kw),
    "MinLSTM": lambda size, **kw: prnn.MinLSTM(size, size, **kw),
    "SelectiveSSM": lambda size, **kw: prnn.SelectiveSSM(size, **kw),
    "LinearLMU": lambda size, **kw: prnn.LinearLMU(size, size, size, size, **kw),
    "LMU": lambda size, **kw: prnn.LMU(size, size // 2, size // 2, size // 2, **kw),
    "PLSTM": lambda size, **kw: prnn.PLSTM(size, 1, 4, size // 4, **kw),
    "Titans": lambda size, **kw: prnn.Titans(size, 4, 4, size // 16, **kw),
    "TitansChunked": lambda size, **kw: prnn.TitansChunked(size, 4, 4, size // 16, **kw),
    "ConvLSTM": lambda size, **kw: prnn.ConvLSTM(_channels(size), _channels(size), (4, 4), **kw),
    "ConvS5": lambda size, **kw: prnn.ConvS5(_channels(size), _channels(size), (4, 4), **kw),
    "GatedLinearAttention": lambda size, **kw: prnn.GatedLinearAttention(
        size, 1, 4, size // 4, **kw
    ),
    "Retention": lambda size, **kw: prnn.Retention(size, 1, 4, size // 4, **kw),
    "Mamba2": lambda size, **kw: prnn.Mamba2(size, 1, size // 4, 4, **kw),
    "Based": lambda size, **kw: prnn.Based(size, 1, 2, size // 7, **kw),
    "MLSTM": lambda size, **kw: prnn.MLSTM(size, 1, 4, size // 4, **kw),
}
# What the recurrent weights of the GRU that forgets are multiplied by.
FORGETTING = 0.5


def _forgetting_gru(size: int, **kw: Any) -> prnn.AbstractCell:
    cell = prnn.GRU(size, size, **kw)
    return eqx.tree_at(lambda c: c.weight_h, cell, FORGETTING * cell.weight_h)


# Of four heads the states are square matrices: layers of these make outputs without all states.
HEADS: dict[str, Callable[..., prnn.AbstractCell]] = {
    f"{make.__name__}, 4 heads": (
        lambda size, make=make, **kw: make(size, 4, size // 4, size // 4, **kw)
    )
    for make in (
        prnn.GatedLinearAttention, prnn.Mamba2, prnn.MLSTM, prnn.DeltaNet, prnn.DeltaProduct,
        prnn.M2RNN,
    )
}  # fmt: skip
VARIANTS = {"GRU, forgets": _forgetting_gru, **HEADS}
EQUINOX = "equinox"
NO_KERNELS = "-kernels"
_SWITCH = "PARARNN_KERNELS"


class Case(NamedTuple):
    """One table: a problem, and what is measured on it beside the scan.

    - `question`: why it is measured.
    - `cell`, `length`, `batch`, `size`, `dtype`: the problem; `size` is that of inputs and states.
    - `solvers`: see `settings`; `equinox` is the cell of Equinox in a scan, which projects one
        input at a time.
    - `project`: whether the input projection is measured too, hoisted out of the scan.
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
        options = ["project"] * self.project + ["gradient"] * self.gradient + ["costs"] * self.costs
        options += ["outputs"] * self.outputs
        return " ".join([text, *options, *self.solvers])


def parse_solver(text: str) -> prnn.AbstractSolver | None:
    """`default` → None, `Newton` → `Newton()`, `Newton(64)` → `Newton(chunk_size=64)`."""
    if text == "default":
        return None
    match = re.fullmatch(r"(\w+)(?:\((\d+)\))?", text)
    solver = getattr(prnn.solvers, match[1], None) if match else None
    if match is None or not isinstance(solver, type) or not issubclass(solver, prnn.AbstractSolver):
        raise ValueError(f"`solvers` must be like default, Jacobi or Newton(64); got {text!r}.")
    options: dict[str, Any] = {"chunk_size": int(match[2])} if match[2] else {}
    return solver(**options)


def settings(text: str, cell: prnn.AbstractCell, xs: Any, platform: str | None = None) -> Any:
    """The solver and the adjoint that a text stands for, complete, as a platform would have them.

    `default` is what the package chooses there. Others are read by `parse_solver`, and solve the
    derivative's recurrence too. With `-kernels` behind it, generated kernels are switched off.
    """
    asked = parse_solver(text.removesuffix(NO_KERNELS))
    layer = prnn.RNN(cell, solver=asked, adjoint=asked)
    with _kernels(not text.endswith(NO_KERNELS)):
        solver, _ = select_solver(layer, xs, platform=platform)
        adjoint, _ = select_adjoint(layer, xs, platform=platform)
    return solver, adjoint


@contextlib.contextmanager
def _kernels(on: bool) -> Iterator[None]:
    """With the switch for kernels on or off; what is chosen meanwhile is complete."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = str(int(on))
    try:
        yield
    finally:
        del os.environ[_SWITCH]
        if before is not None:
            os.environ[_SWITCH] = before


def measure(case: Case, *, repetitions: int, limit: float, title: str | None) -> dict[str, Any]:
    """The rows of `compare` for a case, and the bytes that it must move at least."""
    dtype = jnp.dtype(case.dtype)
    key_cell, key_x = jax.random.split(jax.random.key(0))
    cell = (CELLS | VARIANTS)[case.cell](case.size, dtype=dtype, key=key_cell)
    # Time comes first, then the batch: the layout that a scan takes without transposing.
    shape = (case.length, case.batch) if case.batch > 1 else (case.length,)
    xs = jax.random.normal(key_x, (*shape, *_input_shape(cell, case.size)), dtype)

    def over_batch(function):
        if case.batch == 1:
            return function
        return lambda cell, xs: jax.vmap(lambda x: function(cell, x), 1, (1, 0))(xs)

    @over_batch
    def project(cell, xs):
        return cell.project(xs), None

    raw = case.project or case.outputs
    inputs = xs if raw else eqx.filter_jit(project)(cell, xs)[0]

    def make(states_of):
        return over_batch(
            lambda cell, xs: states_of(cell, cell.project(xs) if case.project else xs)
        )

    runs = {"lax.scan": over_batch(_read_scan) if case.outputs else make(scanned)}
    for name in case.solvers:
        one = jax.ShapeDtypeStruct((case.length, *xs.shape[1 + (case.batch > 1) :]), dtype)
        if case.outputs:
            runs[name] = over_batch(_outputs(name))
        elif name == EQUINOX:
            runs[name] = over_batch(_equinox)
        else:
            runs[name] = make(_solve(*settings(name, cell, one)))
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
    read, written = _bytes(inputs), _bytes(states)
    return {
        "floor_bytes": {"forward": read + written, "gradient": 2 * read + written},
        "rows": rows,
    }


def _input_shape(cell, size: int) -> tuple[int, ...]:
    if isinstance(cell, (prnn.ConvLSTM, prnn.ConvS5)):
        return cell.input_channels, *cell.image_shape
    return (size,)


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))


def scanned(cell, us):
    """All states by the plain scan, and no statistics."""
    return scan_states(cell.step, us, cell.init_state()), None


def solved(cell, us, solver, adjoint):
    """All states by a solve, and its statistics."""
    solution = prnn.solve(
        cell.step,
        us,
        cell.init_state(),
        solver=solver,
        adjoint=adjoint,
        structure=cell.structure,
        algebra=cell.algebra,
        throw=False,
    )
    return solution.states, solution.stats


def _solve(solver, adjoint):
    return lambda cell, us: solved(cell, us, solver, adjoint)


def _read_scan(cell, xs):
    """The outputs by the plain scan, which stores all states."""
    us = cell.project(xs)
    return cell.readout(scan_states(cell.step, us, cell.init_state()), us), None


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


# --- the questions of each preset, the biggest first ------------------------------------------

_LENGTHS = (4096, 65_536, 16_384, 1024)


def preset(platform: str) -> Iterator[Case]:
    """All cases of `"cpu"` or `"gpu"`, in order."""
    yield from (_gpu if platform == "gpu" else _cpu)()


def _cpu():
    default = "default against lax.scan"
    for length in _LENGTHS:
        for cell in ("GRU", "DiagonalGRU", "Elman", "DiagonalLSTM"):
            yield Case(default, cell, length)
        if length == 4096:
            for cell in ("GRU", "LSTM"):
                yield Case(default, cell, length, solvers=("default", EQUINOX), project=True)
    for cell in CELLS:
        if cell not in ("GRU", "DiagonalGRU", "Elman", "DiagonalLSTM"):
            yield Case(default, cell, 4096)
    chunks = {
        "DiagonalGRU": ("Newton(1)", "Newton(64)", "Jacobi(64)", "Jacobi(256)"),
        "GRU": ("Newton(64)", "Jacobi(64)", "Jacobi(256)"),
    }
    # Each question once, then at more lengths.
    for length in (4096, 1024, 16_384, 65_536):
        for cell, solvers in chunks.items():
            yield Case("chunk sizes", cell, length, solvers=solvers)
        if length < 65_536:
            # One sequence of 32 units is measured above.
            yield from _batches((8, 64), 32, (length,))
            yield from _batches((1, 8, 64), 128, (length,))
        if length == 1024:
            yield Case("memory floor", "DiagonalGRU", 16_384, size=1024, gradient=False)


def _gpu():
    default, both = "default against lax.scan", ("default", "default-kernels")
    layers, recurrent = "outputs of layers", ("DiagonalGRU", "GRU, forgets", "DiagonalLSTM")
    for cell in recurrent:
        yield Case(default, cell, 65_536, size=64, solvers=both)
    for cell in HEADS:
        yield Case(layers, cell, 4096, size=128, outputs=True)
    for cell, sizes in zip(recurrent[:2], ((16, 32, 64, 128), (32, 64, 128)), strict=True):
        solvers = tuple(f"Newton({n})" for n in sizes)
        yield Case("chunk sizes", cell, 65_536, size=64, solvers=solvers)
    for batch in (256, 16):
        for cell in recurrent[:2]:
            yield Case("batch sizes", cell, 4096, batch, 64, solvers=("default", "Sequential"))
    for size, length in ((64, 4096), (1024, 4096), (64, 1024), (64, 262_144)):
        for cell in recurrent[:2]:
            yield Case(default, cell, length, size=size)
    for cell in HEADS:
        yield Case(layers, cell, 65_536, size=128, outputs=True)
    yield Case(default, "M2RNN, 4 heads", 65_536, size=64)
    yield Case("memory floor", "DiagonalGRU", 65_536, 1, 1024)
    for cell in ("GRU", "LSTM"):
        yield Case(default, cell, 4096, size=64, solvers=("default", EQUINOX), project=True)
    for cell in CELLS:
        if cell not in recurrent:
            yield Case(default, cell, 4096, size=64)


def _batches(batches, size, lengths):
    for length in lengths:
        for batch in batches:
            for cell in ("DiagonalGRU", "GRU"):
                yield Case("batch sizes", cell, length, batch, size)
