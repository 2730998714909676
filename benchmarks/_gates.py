"""How trained networks remember, through gates or by mixing, and what their derivatives take."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import pararnn as prnn
from pararnn._misc import make_ravel
from pararnn.diagnostics import scan_states
from pararnn.jaxprs._counting import loop_turns
from pararnn.jaxprs._elementwise import elementwise_tangents

from ._measure import Row, relative_error
from ._systems import System, sequential, solve, summary, trained

# After how many steps a disturbance is looked at.
AFTER = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_Solver = prnn.solvers.AbstractIterativeSolver
_16, _64 = (prnn.ElementwiseNewton(chunk_size=n) for n in (16, 64))
_JACOBI = tuple(prnn.Jacobi(chunk_size=n) for n in (16, 64))
TEXT = ("gru", "gru_early", "lstm", "elman")
M2RNN = "M2RNN, untrained"
# Networks, lengths and methods. The derivative by Newton's method is one correction.
SWEEPS: list[tuple[str, int, tuple[_Solver, ...]]] = [
    ("gru_s3", 1024, (_16, prnn.Speculative(chunk_size=16, num_candidates=12))),
    ("gru_a5", 1024, (_16, prnn.Speculative(chunk_size=32, num_candidates=512))),
    (M2RNN, 1024, (_16, prnn.Newton(chunk_size=16))),
    *((name, 1024, (_16, _64, *_JACOBI)) for name in TEXT),
    *((name, 16_384, (_16,)) for name in TEXT),
]


# --- gates or mixing --------------------------------------------------------------------------


def gates(
    name: str, every: int = 1000, count: int = 6, after: tuple[int, ...] = AFTER
) -> list[Row]:
    """What is left of small disturbances of the state, and how much of that the gates explain.

    The product of the Jacobians of `n` steps is compared with the product of their elementwise
    parts, in float64, from each `every`-th step of a text on, at `count` times.

    **Returns:**

    A row for each `n` of `after`. `left` is what is left of a disturbance and `missed` how far the
    elementwise parts are from it: root mean squares over all directions and times, relative to the
    disturbance. `explained` is the part of the square of `left` that is not missed. "above x"
    counts the singular values of the product that are, on average.
    """
    system = trained(name, every * count + after[-1], jnp.float64)
    states = sequential(system)
    found = [_products(system, states, every // 2 + every * i, after) for i in range(count)]
    left, missed, values = (np.stack(arrays) for arrays in zip(*found, strict=True))
    left, missed = np.mean(left, axis=0), np.mean(missed, axis=0)
    return [
        {
            "network": name,
            "steps": steps,
            "left": float(np.sqrt(left[i])),
            "missed": float(np.sqrt(missed[i])),
            "explained": float(1 - missed[i] / left[i]),
            **{f"above {x:g}": float(np.mean(np.sum(values[:, i] > x, -1))) for x in (1e-1, 1e-4)},
        }
        for i, steps in enumerate(after)
    ]


def _products(
    system: System, states: Any, time: int, after: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the Jacobians' product over so many steps from a time on: the mean square of what it
    makes of a unit vector, the same of what the elementwise parts miss, and its singular values."""
    whole, elementwise = (
        np.asarray(products(step, system, states, time, after))
        for step in (system.step, elementwise_tangents(system.step))
    )
    size = whole.shape[-1]
    left, missed = (np.sum(m**2, axis=(1, 2)) / size for m in (whole, whole - elementwise))
    return left, missed, np.linalg.svd(whole, compute_uv=False)


def products(
    step: Callable[[Any, Any], Any], system: System, states: Any, time: int, after: tuple[int, ...]
) -> Any:
    """The transposed products of the Jacobians of `step` over so many steps after `time`, at the
    states of the `system`: `(len(after), size, size)`."""
    ravel, unravel, size, dtype = make_ravel(system.init)

    def body(carry, x):
        vector, tangents = carry
        new, push = jax.linearize(lambda v: ravel(step(unravel(v), x)), vector)
        tangents = jax.vmap(push)(tangents)
        return (new, tangents), tangents

    @jax.jit
    def run(vector, xs):
        rows = jax.lax.scan(body, (vector, jnp.eye(size, dtype=dtype)), xs)[1]
        return rows[np.asarray(after) - 1]

    xs = jtu.tree_map(lambda x: x[time + 1 : time + 1 + after[-1]], system.xs)
    return run(ravel(jtu.tree_map(lambda h: h[time], states)), xs)


# --- sweeps -----------------------------------------------------------------------------------


def sweeps(name: str, length: int, solver: _Solver) -> Row:
    """The iterations of a solve and of its derivative, and their errors beside those of `lax.scan`
    in the same float32; all errors are against `lax.scan` in float64.

    The derivative is that of a random linear function of all states with respect to what the steps
    consume, at the states of the sequential run.
    """
    exact, floors = _exact(name, length)
    system = _system(name, length, jnp.float32)
    row = {"network": name, "L": length, "method": type(solver).__name__}
    row |= summary(solve(system, solver), exact[0]) | {"error of the scan": floors[0]}
    if isinstance(solver, prnn.Speculative):  # the derivative has no basins to choose from
        return row

    def states_of(xs):
        forward = prnn.Sequential()
        return prnn.solve(system.step, xs, system.init, solver=forward, adjoint=solver).states

    gradient = jax.grad(_linear(states_of, _weights(name, length, jnp.float32)))
    turns = [(path, n) for path, n in loop_turns(gradient, system.xs) if "transpose" in path]
    # A linear recurrence with all of its tangents takes one correction, and no loop.
    iterations = [n for path, n in turns if "pararnn_iterations" in path]
    return row | {
        "derivative": max(iterations, default=1),
        "derivative finished sequentially": any(n for path, n in turns if "finish" in path),
        "error of the derivative": relative_error(jax.jit(gradient)(system.xs), exact[1]),
        "error of the scan's derivative": floors[1],
    }


@functools.lru_cache(maxsize=1)
def _exact(name: str, length: int) -> tuple[tuple[Any, Any], tuple[float, float]]:
    """States and gradient by `lax.scan` in float64, and the errors of `lax.scan` in float32."""
    exact, rounded = (_scanned(name, length, dtype) for dtype in (jnp.float64, jnp.float32))
    state_error, gradient_error = map(relative_error, rounded, exact)
    return exact, (state_error, gradient_error)


def _scanned(name: str, length: int, dtype: Any) -> tuple[Any, Any]:
    system = _system(name, length, dtype)

    def states_of(xs):
        return scan_states(system.step, xs, system.init)

    gradient = jax.grad(_linear(states_of, _weights(name, length, dtype)))
    return sequential(system), jax.jit(gradient)(system.xs)


def _system(name: str, length: int, dtype: Any) -> System:
    """A trained network, or an M²RNN with its initial weights and random inputs."""
    if name != M2RNN:
        return trained(name, length, dtype)
    cell = prnn.M2RNN(32, 2, 16, 16, dtype=jnp.float32, key=jax.random.key(0))
    cell = jtu.tree_map(lambda a: a.astype(dtype), cell)
    xs = jax.random.normal(jax.random.key(1), (length, 32), jnp.float32).astype(dtype)
    return System(cell.step, cell.project(xs), cell.init_state())


def _weights(name: str, length: int, dtype: Any) -> Any:
    """A random number for each number of the states."""
    leaves, treedef = jtu.tree_flatten(_system(name, 1, dtype).init)
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal((length, *leaf.shape)).astype(np.float32) for leaf in leaves]
    return jtu.tree_unflatten(treedef, [jnp.asarray(w, dtype) for w in drawn])


def _linear(states_of: Callable[[Any], Any], weights: Any) -> Callable[[Any], Any]:
    """The inner product of the states and the weights, of what the steps consume."""

    def loss(xs):
        pairs = zip(jtu.tree_leaves(states_of(xs)), jtu.tree_leaves(weights), strict=True)
        return sum(jnp.sum(h * w) for h, w in pairs)

    return loss
