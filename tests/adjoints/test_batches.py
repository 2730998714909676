"""Many sequences at once: the derivative that is chosen for them, and what it takes."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import PROBLEMS, error, normal, scan

import pararnn as prnn
from pararnn._batch import batch_size

TOLERANCE = 1e-8
MANY = 16  # from here on the derivative goes step by step
SEQUENTIAL = {"solver": prnn.Sequential(), "adjoint": prnn.Sequential()}


def seen(function, *args):
    """The sizes that `batch_size` tells inside `function`, which calls `look` on its arrays."""
    sizes = []

    def look(*arrays):
        sizes.append(batch_size(arrays))
        return sum((jnp.sum(jnp.sin(a)) for a in arrays if isinstance(a, jax.Array)), jnp.zeros(()))

    function(look)(*args)
    return sizes


def test_the_size_of_a_batch_is_seen():
    """Only a hint, but what is chosen by it would be chosen wrongly."""
    xs, w = jnp.ones((3, 5, 2)), jnp.ones((5, 2))
    assert seen(lambda f: f, xs, w) == [1]
    assert seen(jax.vmap, xs, normal(0, (3, 2))) == [3]
    assert seen(lambda f: jax.vmap(f, (0, None)), xs, w) == [3]
    assert seen(lambda f: jax.vmap(f, (1, None)), xs, w) == [5]
    # One inside another, over the same array or over different ones.
    assert seen(lambda f: jax.vmap(jax.vmap(f, (0, None)), (0, None)), xs, w) == [15]
    assert seen(lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)), xs, w) == [15]
    # Around, between and inside other transformations.
    assert seen(lambda f: jax.jit(jax.vmap(f, (0, None))), xs, w) == [3]
    assert seen(lambda f: jax.vmap(jax.grad(f), (0, None)), xs, w) == [3]
    mean = seen(lambda f: jax.grad(lambda *a: jnp.sum(jax.vmap(f, (0, None))(*a)), 1), xs, w)
    assert mean == [3]
    # What is traced on its own does not see what is around it.
    assert seen(lambda f: jax.vmap(jax.jit(f), (0, None)), xs, w) == [1]
    # Integers, booleans and random keys; what is not an array is passed over.
    keys = jax.random.split(jax.random.key(0), 4)
    assert seen(lambda f: jax.vmap(lambda k: f({"key": k, "n": None})), keys) == [4]
    assert batch_size(()) == 1
    # A size that is not known yet.
    (length,) = jax.export.symbolic_shape("n")
    open_shape = jax.ShapeDtypeStruct((length, 2), jnp.float64)
    assert seen(lambda f: lambda x: jax.export.export(jax.jit(jax.vmap(f)))(x), open_shape) == [1]


def solved(problem):
    def run(params, xs, init):
        step = functools.partial(problem.step, params)
        return prnn.solve(step, xs, init, **SEQUENTIAL).states

    return run


def scanned(problem):
    return lambda params, xs, init: scan(functools.partial(problem.step, params), xs, init)


def batch_of(tree, *sizes):
    """Different sequences, with axes of these sizes after that of time."""
    scales = 1 + 0.1 * normal(3, sizes)

    def one(x):
        scale = scales.astype(x.dtype).reshape(1, *sizes, *(1,) * (x.ndim - 1))
        return x.reshape(x.shape[0], *(1,) * len(sizes), *x.shape[1:]) * scale

    return jtu.tree_map(one, tree)


@pytest.mark.parametrize("name", ["LSTM", "dense GRU", "complex"])
def test_derivatives_of_many_sequences(name):
    """Both modes, and one over the other, with respect to the parameters, the inputs and one
    initial state for all."""
    problem = PROBLEMS[name]
    params, xs, init = problem.make(7, np.float64)
    args = (params, batch_of(xs, MANY), init)

    def results(run):
        def loss(*args):
            states = jax.vmap(run, (None, 1, None), 1)(*args)
            return sum(jnp.sum(jnp.abs(jnp.sin(h)) ** 2) for h in jtu.tree_leaves(states))

        def gradient(args):
            return jax.grad(loss, argnums=(0, 1, 2))(*args)

        direction = jtu.tree_map(lambda x: jnp.cos(x + 1), args)
        return gradient(args), jax.jvp(gradient, (args,), (direction,))

    got, expected = (
        jax.jit(functools.partial(results, run))() for run in (solved(problem), scanned(problem))
    )
    assert error(got, expected) <= TOLERANCE


def test_every_member_has_its_gradient():
    """Two batches, one inside the other, around the gradient: of parameters too; and the Hessian
    of each."""
    problem = PROBLEMS["diagonal GRU"]
    params, xs, init = problem.make(6, np.float64)
    many = batch_of(xs, 4, MANY // 4)

    def results(run):
        def loss(*args):
            return sum(jnp.sum(jnp.sin(h)) for h in jtu.tree_leaves(run(*args)))

        def over_both(f):
            return jax.vmap(jax.vmap(f, (None, 1, None)), (None, 1, None))

        gradients = over_both(jax.grad(loss, argnums=(0, 1, 2)))(params, many, init)
        return gradients, over_both(jax.hessian(loss, argnums=2))(params, many, init)

    got, expected = (
        jax.jit(functools.partial(results, run))() for run in (solved(problem), scanned(problem))
    )
    assert error(got, expected) <= TOLERANCE


def test_a_leaf_that_no_tangent_reaches():
    """A clock counts on its own, and a window of past inputs does not depend on the parameters."""
    xs, weight = normal(0, (6, MANY, 2)), normal(1, (2,))

    def states(run, weight, x):
        def step(state, x):
            h = jnp.tanh(weight * state["h"] + x + 0.1 * state["past"])
            return {"clock": state["clock"] + 1, "past": x, "h": h}

        init = {"clock": jnp.zeros(()), "past": jnp.zeros(2), "h": jnp.zeros(2)}
        return run(step, x, init)

    def by_solve(step, xs, init):
        return prnn.solve(step, xs, init, **SEQUENTIAL).states

    def loss(run, weight, xs):
        found = jax.vmap(lambda x: states(run, weight, x), 1)(xs)
        return jnp.sum(jnp.sin(found["h"])) + jnp.sum(found["clock"])

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(weight, xs)
        for run in (by_solve, scan)
    )
    assert error(got, expected) <= TOLERANCE


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("batch", [MANY, 64])
def test_batches_take_less_memory_than_the_scan(batch):
    """Neither are all inputs transposed, nor is anything kept but the states."""
    problem, length, size = PROBLEMS["dense GRU"], 64, 8
    params = tuple(normal(i, (size, size), np.float32, 0.1) for i in range(3))
    xs = tuple(normal(10 + i, (length, batch, size), np.float32) for i in range(3))
    init = jnp.zeros(size, jnp.float32)

    def needed(run):
        def loss(params, xs):
            return jnp.sum(jnp.sin(jax.vmap(lambda x: run(params, x, init), 1, 1)(xs)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, xs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 0 < needed(solved(problem)) < 0.4 * needed(scanned(problem))
