"""The recurrences on which solvers are compared, and their solutions.

A `System` is a step with its inputs and initial state. Where derivatives with respect to
parameters count, a cell and its projected inputs take its place (`scanned`, `solved`).
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import pararnn as prnn
from pararnn.diagnostics import scan_states

from ._measure import Row, relative_error

# --- cells ------------------------------------------------------------------------------------


def scanned(cell: prnn.AbstractCell, us: Any) -> tuple[Any, None]:
    """All states by `lax.scan`, and no statistics."""
    return scan_states(cell.step, us, cell.init_state()), None


def solved(cell: prnn.AbstractCell, us: Any, solver: Any = None, adjoint: Any = None) -> Any:
    """All states by `pararnn.solve`, and its statistics."""
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


def _square(make: Callable[..., prnn.AbstractCell]) -> Callable[..., prnn.AbstractCell]:
    return lambda size, **kw: make(size, size, **kw)


def _heads(make: Callable[..., prnn.AbstractCell], *shape: int) -> Callable[..., prnn.AbstractCell]:
    heads, key_size = shape
    return lambda size, **kw: make(size, heads, key_size, size // key_size, **kw)


def _image(make: Callable[..., prnn.AbstractCell]) -> Callable[..., prnn.AbstractCell]:
    return lambda size, **kw: make(max(size // 16, 1), max(size // 16, 1), (4, 4), **kw)


# From a size, the number of state elements, to a cell whose inputs have as many features. For S4D
# and SelectiveSSM it is the number of rows of the state, a matrix; for cells of images, the number
# of values of an image of 4 × 4 pixels.
CELLS: dict[str, Callable[..., prnn.AbstractCell]] = {
    **{
        make.__name__: _square(make)
        for make in (
            prnn.Elman, prnn.GRU, prnn.DiagonalGRU, prnn.LSTM, prnn.DiagonalLSTM, prnn.SLSTM,
            prnn.MinMax, prnn.LRU, prnn.PiecewiseLinearRNN,
        )
    },
    "M2RNN": _heads(prnn.M2RNN, 1, 4),
    "DeltaNet": _heads(prnn.DeltaNet, 1, 4),
    "DeltaProduct": _heads(prnn.DeltaProduct, 1, 4),
    "TTTLinear": _heads(prnn.TTTLinear, 1, 4),
    "Aaren": lambda size, **kw: prnn.Aaren(size, 2, size // 4, size // 2 - 2, **kw),
    "S5": _square(prnn.S5),
    "S4D": prnn.S4D,
    "RGLRU": prnn.RGLRU,
    "MinGRU": _square(prnn.MinGRU),
    "MinLSTM": _square(prnn.MinLSTM),
    "SelectiveSSM": prnn.SelectiveSSM,
    "LinearLMU": lambda size, **kw: prnn.LinearLMU(size, size, size, size, **kw),
    "LMU": lambda size, **kw: prnn.LMU(size, size // 2, size // 2, size // 2, **kw),
    "PLSTM": _heads(prnn.PLSTM, 1, 4),
    "Titans": lambda size, **kw: prnn.Titans(size, 4, 4, size // 16, **kw),
    "TitansChunked": lambda size, **kw: prnn.TitansChunked(size, 4, 4, size // 16, **kw),
    "ConvLSTM": _image(prnn.ConvLSTM),
    "ConvS5": _image(prnn.ConvS5),
    "GatedLinearAttention": _heads(prnn.GatedLinearAttention, 1, 4),
    "Retention": _heads(prnn.Retention, 1, 4),
    "Mamba2": lambda size, **kw: prnn.Mamba2(size, 1, size // 4, 4, **kw),
    "Based": lambda size, **kw: prnn.Based(size, 1, 2, size // 7, **kw),
    "MLSTM": _heads(prnn.MLSTM, 1, 4),
}  # fmt: skip


def _forgetting_gru(size: int, **kw: Any) -> prnn.AbstractCell:
    cell = prnn.GRU(size, size, **kw)
    return eqx.tree_at(lambda c: c.weight_h, cell, 0.5 * cell.weight_h)


# Four heads with square states: layers compute their outputs chunkwise, without storing all states.
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

# --- systems ----------------------------------------------------------------------------------


class System(NamedTuple):
    """A recurrence, as [`pararnn.solve`][] takes it."""

    step: Callable[[Any, Any], Any]
    xs: Any
    init: Any


def of_cell(cell: prnn.AbstractCell, xs: Any) -> System:
    """A cell driven by `xs`."""
    return System(cell.step, cell.project(xs), cell.init_state())


def sequential(system: System) -> Any:
    """All states by a jitted `lax.scan`."""
    return jax.jit(functools.partial(scan_states, system.step))(system.xs, system.init)


def solve(system: System, solver: prnn.AbstractSolver | None) -> prnn.Solution:
    """A jitted solve, which may fail."""

    def run(xs, init):
        return prnn.solve(system.step, xs, init, solver=solver, throw=False)

    return jax.jit(run)(system.xs, system.init)


def summary(solution: prnn.Solution, exact: Any) -> Row:
    """Chunk size, iterations, critical path in steps, and the error against `exact`."""
    stats = solution.stats
    return {
        "chunk": int(stats.chunk_size),
        "iterations": int(stats.iterations),
        "steps": int(stats.sequential_steps),
        "finished sequentially": bool(stats.fallback),
        "error": relative_error(solution.states, exact),
    }


def _normal(seed: int, shape: tuple[int, ...], scale: float, dtype: Any):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def _cast(cell: Any, dtype: Any):
    """The same weights in both dtypes, which the same key would not give."""
    return jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, cell)


def elman(gain: float, length: int, dtype: Any = jnp.float32, size: int = 32) -> System:
    """`h' = tanh(W h + x)` with weak inputs, `W` of spectral radius about `gain`."""
    weight = _normal(0, (size, size), gain / size**0.5, dtype)
    xs = _normal(1, (length, size), 0.25, dtype)
    return System(lambda h, x: jnp.tanh(weight @ h + x), xs, jnp.zeros(size, dtype))


def gru(gain: float, length: int, dtype: Any = jnp.float32, size: int = 32) -> System:
    """A GRU whose recurrent matrix is `gain` times its initial value."""
    cell = _cast(prnn.GRU(size, size, dtype=jnp.float32, key=jax.random.key(0)), dtype)
    cell = eqx.tree_at(lambda c: c.weight_h, cell, gain * cell.weight_h)
    return of_cell(cell, _normal(1, (length, size), 1.0, dtype))


def lstm(length: int, dtype: Any = jnp.float32, size: int = 32) -> System:
    """An LSTM as initialised."""
    cell = _cast(prnn.LSTM(size, size, dtype=jnp.float32, key=jax.random.key(0)), dtype)
    return of_cell(cell, _normal(1, (length, size), 1.0, dtype))


def latch(length: int, dtype: Any = jnp.float32) -> System:
    """`h' = tanh(3 h x)` with `x = ±1`: a parity that is never forgotten."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], length)
    return System(lambda h, x: jnp.tanh(3 * h * x), jnp.asarray(signs, dtype), jnp.ones((), dtype))


def lorenz96(size: int, length: int, dtype: Any = jnp.float32) -> System:
    """Lorenz, *Predictability: a problem partly solved* (1996), forcing 8, Runge–Kutta steps of
    0.01: chaotic."""

    def field(x):
        return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8.0

    def step(x, dt):
        k1 = field(x)
        k2 = field(x + dt / 2 * k1)
        k3 = field(x + dt / 2 * k2)
        k4 = field(x + dt * k3)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    init = 8.0 + _normal(0, (size,), 1.0, dtype)
    return System(step, jnp.full(length, 0.01, dtype), init)


def langevin(length: int, dtype: Any = jnp.float32, size: int = 8) -> System:
    """Euler–Maruyama steps of 0.01 of `dx = (x - x³) dt + σ dW` with `σ = 0.7`: particles that hop
    between two wells."""
    noise = _normal(0, (length, size), 0.7 * 0.1, dtype)
    return System(lambda x, w: x + 0.01 * (x - x**3) + w, noise, jnp.ones(size, dtype))


# From forgetful to chaotic; from a length and a dtype.
SYSTEMS: dict[str, Callable[[int, Any], System]] = {
    "GRU": functools.partial(gru, 1.0),
    "GRU, gain 2": functools.partial(gru, 2.0),
    "LSTM": lstm,
    "Elman, gain 1.0": functools.partial(elman, 1.0),
    "Elman, gain 1.2": functools.partial(elman, 1.2),
    "Elman, gain 1.5": functools.partial(elman, 1.5),
    "latch": latch,
    "Langevin": langevin,
    "Lorenz-96, 5": functools.partial(lorenz96, 5),
    "Lorenz-96, 40": functools.partial(lorenz96, 40),
}

# --- trained networks -------------------------------------------------------------------------

_FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "trained"
_TEXT = {"gru": prnn.GRU, "gru_early": prnn.GRU, "lstm": prnn.LSTM, "elman": prnn.Elman}
_GROUPS = ("gru_s3", "gru_a5")


def trained(name: str, length: int, dtype: Any = jnp.float32) -> System:
    """A network of `tests/trained` over `length` steps of what it was trained for: text, or random
    words in the generators of a group."""
    with np.load(_FOLDER / f"{name}.npz") as file:
        arrays = {key: jnp.asarray(file[key], dtype) for key in file.files}
    if name in _GROUPS:
        return _word_problem(arrays, length)
    with np.load(_FOLDER / "text.npz") as file:
        ids = np.resize(file["ids"], length)
    embedding = arrays.pop("embedding")
    cell = _TEXT[name](
        embedding.shape[1], arrays["weight_h"].shape[1], dtype=dtype, key=jax.random.key(0)
    )
    cell = eqx.tree_at(lambda c: [getattr(c, key) for key in arrays], cell, list(arrays.values()))
    return of_cell(cell, embedding[ids])


def _word_problem(arrays: dict[str, Any], length: int) -> System:
    fields = {"weight_ih": "ih", "weight_hh": "hh", "bias": "b", "bias_n": "bn"}
    size, inputs = arrays["hh"].shape[1], arrays["E"].shape[1]
    cell = eqx.nn.GRUCell(inputs, size, dtype=arrays["hh"].dtype, key=jax.random.key(0))
    cell = eqx.tree_at(
        lambda c: [getattr(c, key) for key in fields],
        cell,
        [arrays[key] for key in fields.values()],
    )
    letters = jax.random.randint(jax.random.key(1), (length,), 0, len(arrays["E"]))
    return System(lambda h, x: cell(x, h), arrays["E"][letters], jnp.zeros(size, cell.bias.dtype))
