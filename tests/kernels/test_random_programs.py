"""Kernels of random steps equal plain loops, or are refused with a reason.

What rounding may change is measured: the plain loop is run again with its inputs moved by their
last place. A step that rounds, compares or selects may well change more than in the last place.
"""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from random_steps import STATES, random_step
from random_weights import random_array
from sweeps import plain_sweep
from systems import INTERPRET

import pararnn as prnn
from pararnn.kernels import fused_sweep, unsupported

CHUNKS, STEPS = 3, 2
LENGTH = CHUNKS * STEPS - 1
GEOMETRY = {"num_steps": STEPS, "stride": STEPS, "keep": True}
DTYPES = [np.float32, np.float64, jnp.bfloat16, np.float16, np.complex64]
REAL = [state for state in STATES if state != "typed"]
# Otherwise XLA leaves out roundings of narrow numbers between operations.
EXACT = {"xla_allow_excess_precision": False}


def problem(seed, dtype, state, count=10, operations=None):
    """A random step, starts and inputs."""
    made = random_step(seed, dtype, state, count, operations)
    rng = np.random.default_rng(seed)
    starts = [random_array(rng, (CHUNKS, *s.shape), s.dtype) for s in made.init]
    return made.step, starts, random_array(rng, (LENGTH, *made.xs.shape), made.xs.dtype)


def wide(x):
    return np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def moved(rng, x):
    """The same, about one unit of the last place away."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    eps = float(jnp.finfo(x.dtype).eps)
    return jnp.asarray(wide(x) * (1 + eps * rng.choice([-1.0, 1.0], x.shape)), x.dtype)


def check(fused, plain, args, dtype):
    """Whether two functions agree, as far as rounding lets them: but for a few operations' units of
    the last place, or for a few times what moving the arguments by one changes."""
    got = jax.jit(fused, compiler_options=EXACT)(*args)
    plain = jax.jit(plain, compiler_options=EXACT)
    expected, rng = plain(*args), np.random.default_rng(0)
    others = [plain(*jtu.tree_map(lambda x: moved(rng, x), args)) for _ in range(2)]
    assert jtu.tree_structure(got) == jtu.tree_structure(expected)
    results = zip(*map(jtu.tree_leaves, (got, expected, *others)), strict=True)
    for a, b, *near in results:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b, *near = map(wide, (a, b, *near))
        assert np.isfinite(b).all()
        change = max(np.abs(b - c).max(initial=0) for c in near)
        units = 8 if jnp.finfo(dtype).bits < 32 else 64
        rounding = units * float(jnp.finfo(dtype).eps) * max(1.0, np.abs(b).max(initial=0))
        assert np.abs(a - b).max(initial=0) <= max(rounding, 8 * change)


def sweeps(step, **geometry):
    """The kernel, and the plain sweep."""

    def fused(starts, xs):
        return fused_sweep(step, starts, xs, interpret=INTERPRET, **geometry)

    return fused, lambda starts, xs: plain_sweep(step, starts, xs, **geometry)


# Seeds of steps that are refused, as they use what kernels lack.
REFUSED = {
    6: "the step uses `reduce_prod`",
    7: "the step uses `reduce_prod`",
    12: "the step uses `argmax`",
}


@pytest.mark.parametrize("seed", [*range(5, 14), *range(15, 20)])
def test_values(seed):
    dtype = DTYPES[seed % len(DTYPES)]
    states = REAL if dtype == np.complex64 else list(STATES)
    step, starts, xs = problem(seed, dtype, states[seed % len(states)])
    assert unsupported(step, starts, xs) == REFUSED.get(seed)
    if seed not in REFUSED:
        check(*sweeps(step, **GEOMETRY, reverse=seed % 2 == 0), (starts, xs), dtype)


# About half of these meet weights whose elements are not evenly spaced in what they are made of.
@pytest.mark.parametrize(
    "seeds",
    [(400, 401, 402, 435, 450, 501, 516), (403, 404, 624, 757, 792), (405, 406, 822, 824, 852)],
)
def test_products(seeds):
    """Small steps, of products by weights that lie in memory in all ways."""
    problems = [
        problem(seed, np.float32, ["long", "vector", "matrix"][seed % 3], 2, ["product"])
        for seed in seeds
    ]
    assert not any(unsupported(*p) for p in problems)

    def of_all(k):
        def run(*args):
            pairs = zip(problems, args, strict=True)
            return [sweeps(step, **GEOMETRY)[k](*arg) for (step, *_), arg in pairs]

        return run

    check(of_all(0), of_all(1), [(starts, xs) for _, starts, xs in problems], np.float32)


@pytest.mark.parametrize(
    "seed, state, axes",
    [
        (101, "typed", [(None, 0, None)]),
        (102, "matrix", [(0, None, 0)]),
        (111, "long", [(None, 0, 0), (0, None, 0)]),
    ],
)
def test_batches(seed, state, axes):
    """Under `jax.vmap`, and `jax.vmap` of it, of weights, starts and inputs."""
    step, starts, xs = problem(seed, np.float32, state)
    rng = np.random.default_rng(seed)

    def more(k, x):
        batch = [2 for axis in axes if axis[k] is not None]
        return random_array(rng, (*batch, *x.shape), x.dtype)

    def of_one(sweep):
        def run(weight, starts, xs):
            return sweep(lambda state, x: step(state, x * weight))(starts, xs)

        for axis in axes:
            run = jax.vmap(run, in_axes=axis)
        return run

    args = more(0, xs[0]), [more(1, s) for s in starts], more(2, xs)
    fused, plain = (of_one(lambda f, k=k: sweeps(f, **GEOMETRY)[k]) for k in range(2))
    check(fused, plain, args, np.float32)


def push(step, state, x, tangent):
    return jax.jvp(lambda s: step(s, x), (state,), (tangent,))[1]


def pull(step, state, x, cotangent):
    return jax.vjp(lambda s: step(s, x), state)[1](cotangent)[0]


def bend(step, state, x, tangent):
    """Of the second derivative."""
    return push(lambda s, x: pull(step, s, x, s), state, x, tangent)


@pytest.mark.parametrize(
    "through, seed, dtype, state",
    [
        (push, 201, np.complex64, "matrix"),
        (pull, 203, np.float32, "square"),
        (pull, 204, jnp.bfloat16, "long"),
        (bend, 205, np.float32, "vector"),
        (bend, 206, np.float64, "single"),
    ],
)
def test_derivatives(through, seed, dtype, state):
    """The linear steps of which derivatives are made."""
    step, starts, xs = problem(seed, dtype, state, 8)
    rng = np.random.default_rng(seed)
    before = [random_array(rng, (LENGTH, *s.shape[1:]), s.dtype) for s in starts]

    def linear_step(v, inputs):
        state, x = inputs
        return [0.3 * d + 0.5 * v for v, d in zip(v, through(step, state, x, v), strict=True)]

    assert unsupported(linear_step, starts, (before, xs)) is None
    geometry = {**GEOMETRY, "reverse": through is pull}
    check(*sweeps(linear_step, **geometry), (starts, (before, xs)), dtype)


def test_hessian_of_a_solve():
    step, starts, xs = problem(300, np.float64, "vector", 5)
    init, weights = [s[0] for s in starts], jnp.ones(2)
    solver = prnn.Newton(chunk_size=2, sweep_method=prnn.sweeps.Fused(interpret=INTERPRET))

    def scaled(weights):
        return lambda state, x: step([weights[0] * s for s in state], weights[1] * x)

    def ours(weights):
        return prnn.solve(scaled(weights), xs, init, solver=solver, throw=False).states

    def scan(weights):
        step = scaled(weights)
        return jax.lax.scan(lambda h, x: (step(h, x),) * 2, init, xs)[1]

    def modes(states):
        def loss(weights):
            return sum(jnp.sum(jnp.sin(s)) for s in states(weights))

        return lambda weights: (states(weights), jax.hessian(loss)(weights))

    check(modes(ours), modes(scan), (weights,), np.float64)
