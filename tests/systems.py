"""Recurrences to solve, the plain scan that they are compared with, and the methods to compare.

Every step is written out here and owes nothing to the package: `step(params, state, x) -> state`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import pararnn as prnn
from benchmarks import _systems

# Where there is a GPU, kernels run on it; elsewhere they are interpreted.
INTERPRET = jax.default_backend() == "cpu"


def scan(step, xs, init):
    """The states, by definition."""

    def body(state, x):
        state = step(state, x)
        return state, state

    return jax.lax.scan(body, init, xs)[1]


def tolerance(dtype) -> float:
    """How far a solution may be from the scan's, relative to the state's scale."""
    return {16: 2e-2, 32: 1e-5, 64: 1e-10}[jnp.finfo(dtype).bits]


def error(got, expected) -> float:
    """The largest difference, relative to the largest magnitude of its leaf."""

    def one(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a), np.asarray(b)
        if b.size == 0:
            return 0.0
        wide = complex if np.iscomplexobj(b) else float
        a, b = a.astype(wide), b.astype(wide)
        scale = max(float(np.max(np.abs(b))), np.finfo(float).tiny)
        worst = float(np.max(np.abs(a - b))) / scale
        return np.inf if np.isnan(worst) else worst

    assert jtu.tree_structure(got) == jtu.tree_structure(expected)
    return max(map(one, jtu.tree_leaves(got), jtu.tree_leaves(expected)))


@functools.cache
def trained(name, length):
    """`(system, its states by a scan, and how exact these are)` of a trained network."""
    system, wide = (_systems.trained(name, length, t) for t in (jnp.float32, jnp.float64))
    states, exact = (jax.jit(functools.partial(scan, s.step))(s.xs, s.init) for s in (system, wide))
    exact = jax.tree.map(lambda x, like: x.astype(like.dtype), exact, states)
    return system, states, error(states, exact)


def successful(solution) -> bool:
    return bool(solution.result == prnn.RESULTS.successful)


def assert_right(solution, expected):
    """The states are the scan's, and the final one is the last of them."""
    __tracebackhide__ = True
    assert successful(solution), solution.result
    first = jtu.tree_leaves(expected)[0]
    assert error(solution.states, expected) <= tolerance(first.dtype)
    if first.shape[0]:
        last = jtu.tree_map(lambda h: h[-1], solution.states)
        assert error(solution.final, last) == 0


def over(solvers, *names):
    """Parametrizes a test by solvers of a table: by all, or by those named."""
    names = names or tuple(solvers)
    return pytest.mark.parametrize("solver", [solvers[name] for name in names], ids=names)


def previous(init, states, xs):
    """The states that the steps start from."""
    length = jtu.tree_leaves(xs)[0].shape[0]
    return jtu.tree_map(lambda h0, h: jnp.concatenate([h0[None], h])[:length], init, states)


def normal(seed, shape, dtype=np.float64, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


# --- steps ------------------------------------------------------------------------------------


def _dense_gru(params, h, u):
    a, b, c = params
    r = jax.nn.sigmoid(u[0] + a @ h)
    z = jax.nn.sigmoid(u[1] + b @ h)
    return (1 - z) * jnp.tanh(u[2] + r * (c @ h)) + z * h


def _diagonal_gru(params, h, u):
    a, b, c = params
    r = jax.nn.sigmoid(u[0] + a * h)
    z = jax.nn.sigmoid(u[1] + b * h)
    return (1 - z) * jnp.tanh(u[2] + c * (r * h)) + z * h


def _elman(params, h, u):
    (a,) = params
    return jnp.tanh(a @ h + u)


def _lstm(params, state, u):
    """Each unit couples its own elements of `c` and `h`: 2 × 2 blocks, across leaves."""
    a, b, c = params
    f = jax.nn.sigmoid(u[0] + a * state["h"])
    i = jax.nn.sigmoid(u[1] + b * state["h"])
    memory = f * state["c"] + i * jnp.tanh(u[2] + c * state["h"])
    return {"c": memory, "h": jnp.tanh(memory)}


def _complex_diagonal(params, h, u):
    """Not complex-linear: the magnitude of the state enters."""
    (a,) = params
    h = a * h + jax.lax.complex(*u)
    return h / (1 + h * jnp.conj(h) / 4)


def _matrix(params, m, inputs):
    """A matrix state whose columns are mixed by one matrix; rows of the state do not meet."""
    (a,) = params
    k, v = inputs
    return jnp.tanh(m @ a + k[:, None] * v[None, :])


@dataclasses.dataclass(frozen=True)
class Problem:
    """A contractive recurrence: `make(length, dtype)` gives `(params, xs, init)`."""

    step: Callable[[Any, Any, Any], Any]
    make: Callable[[int, Any], tuple[Any, Any, Any]]


def _gates(count, *shape):
    def make(length, dtype):
        return tuple(normal(10 + i, (length, *shape), dtype) for i in range(count))

    return make


def _weights(count, scale, *shape):
    def make(dtype):
        return tuple(normal(20 + i, shape, dtype, scale) for i in range(count))

    return make


def _problem(step, weights, inputs, init):
    return Problem(step, lambda length, dtype: (weights(dtype), inputs(length, dtype), init(dtype)))


def _complex_of(dtype):
    return np.result_type(dtype, np.complex64)


PROBLEMS = {
    "diagonal GRU": _problem(
        _diagonal_gru, _weights(3, 0.5, 3), _gates(3, 3), lambda dtype: normal(1, (3,), dtype)
    ),
    "dense GRU": _problem(
        _dense_gru, _weights(3, 0.4, 3, 3), _gates(3, 3), lambda dtype: normal(1, (3,), dtype)
    ),
    "Elman": _problem(
        _elman,
        _weights(1, 0.4, 3, 3),
        lambda length, dtype: normal(10, (length, 3), dtype),
        lambda dtype: normal(1, (3,), dtype),
    ),
    "LSTM": _problem(
        _lstm,
        _weights(3, 0.5, 2),
        _gates(3, 2),
        lambda dtype: {"c": normal(1, (2,), dtype), "h": normal(2, (2,), dtype)},
    ),
    "complex": _problem(
        _complex_diagonal,
        lambda dtype: (jnp.asarray([0.7 + 0.3j, -0.5 + 0.4j], _complex_of(dtype)),),
        _gates(2, 2),
        lambda dtype: jnp.asarray([1.0 - 0.5j, 0.3j], _complex_of(dtype)),
    ),
    "matrix": _problem(
        _matrix,
        _weights(1, 0.4, 2, 2),
        _gates(2, 2),
        lambda dtype: normal(1, (2, 2), dtype),
    ),
}

# --- methods ----------------------------------------------------------------------------------

# A new solver joins this table and so meets every problem and every dtype.
SOLVERS: dict[str, prnn.AbstractSolver] = {
    "Sequential": prnn.Sequential(),
    "Newton": prnn.Newton(),
    "Newton 1": prnn.Newton(chunk_size=1),
    "Newton 5": prnn.Newton(chunk_size=5),
    "Newton 1000": prnn.Newton(chunk_size=1000),
    "Newton 1 associative": prnn.Newton(chunk_size=1, linear_method=prnn.scans.Associative()),
    "Newton 3 radix": prnn.Newton(chunk_size=3, linear_method=prnn.scans.Radix()),
    "QuasiNewton 1": prnn.QuasiNewton(chunk_size=1),
    "QuasiNewton 4": prnn.QuasiNewton(chunk_size=4),
    "ElementwiseNewton 4": prnn.ElementwiseNewton(chunk_size=4),
    "Picard": prnn.Picard(),
    "Jacobi 1": prnn.Jacobi(chunk_size=1),
    "Jacobi 4": prnn.Jacobi(chunk_size=4),
    "Jacobi 16": prnn.Jacobi(chunk_size=16),
    "LevenbergMarquardt": prnn.LevenbergMarquardt(),
    "Speculative": prnn.Speculative(chunk_size=4, num_candidates=2),
}
