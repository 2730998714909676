"""What is particular to memories that learn at test time: their gradients, and chunks of steps by
products of matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import error

import pararnn as prnn
from pararnn.cells._titans import _errors

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast


def chunked(dtype=jnp.float64, chunk_length=64):
    cell = prnn.TitansChunked(
        4, 2, 3, 5, 2, chunk_length=chunk_length, max_rate=0.5, dtype=dtype, key=KEY
    )
    # Gates over a wide range: decays down to 1e-6.
    where = lambda c: c.titans.weight_gates  # noqa: E731
    return eqx.tree_at(where, cell, 8 * cell.titans.weight_gates)


def inputs(length, dtype=jnp.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((length, 4)), dtype)


@eqx.filter_jit
def by_scan(cell, xs, state=None, reset=None):
    """The definition, by steps."""
    us, initial = cell.project(xs), cell.init_state()
    reset = jnp.zeros(len(xs), bool) if reset is None else jnp.asarray(reset)

    def step(h, inputs):
        u, anew = inputs
        h = cell.step(jtu.tree_map(lambda a, b: jnp.where(anew, a, b), initial, h), u)
        return h, h

    final, states = jax.lax.scan(step, initial if state is None else state, (us, reset))
    return cell.readout(states, us), final


@eqx.filter_jit
def by_layer(cell, xs, state=None, **options):
    return prnn.RNN(cell)(xs, state, throw=False, **options)


def same(got, expected, tol):
    assert [x.dtype for x in jtu.tree_leaves(got)] == [x.dtype for x in jtu.tree_leaves(expected)]
    assert error(got, expected) <= tol


@pytest.mark.parametrize("length", [1, 63, 64, 1000, 4097])
def test_chunks_are_the_steps(length):
    for dtype, tol in ((jnp.float32, 1e-5), (jnp.float64, 1e-10)):
        cell, xs = chunked(dtype), inputs(length, dtype)
        same(by_layer(cell, xs), by_scan(cell, xs), tol)


@pytest.mark.parametrize("done", [0, 1, 5, 7])
def test_chunks_from_anywhere_with_starts_anew(done):
    """A state to continue from is in the midst of a chunk, and each place of a start anew is tried:
    before the end of that chunk, there, and after it."""
    cell = chunked(chunk_length=8)
    _, state = by_scan(cell, inputs(8 + done))
    for start in (None, *range(11)):
        reset = None if start is None else np.isin(np.arange(19), (start, start + 3, start + 12))
        got = by_layer(cell, inputs(19, seed=1), state, reset=reset)
        same(got, by_scan(cell, inputs(19, seed=1), state, reset), 1e-12)


def test_padding_between_pieces():
    cell, xs = chunked(chunk_length=4), inputs(23)
    reset = np.isin(np.arange(23), (0, 9, 15))
    mask = ~np.isin(np.arange(23), (3, 7, 8, 16, 22))
    ys, final = by_layer(cell, xs, reset=reset, mask=mask)
    places = np.flatnonzero(mask)
    expected, last = by_scan(cell, xs[places], None, reset[places])
    same((ys[places], final), (expected, last), 1e-12)
    assert not ys[~mask].any()


def test_derivatives_of_chunks():
    """In both modes, for a batch, and with a recomputed forward pass."""
    cell, xs = chunked(chunk_length=4), jnp.stack([inputs(11), inputs(11, seed=1)])
    _, state = by_scan(cell, inputs(6, seed=2))
    reset = np.arange(11) == 6
    weights = jnp.cos(jnp.arange(22.0).reshape(11, 2))
    params, rest = eqx.partition(cell, eqx.is_inexact_array)

    def losses(run):
        def loss(params, xs, state):
            ys, final = run(eqx.combine(params, rest), xs, state, reset=reset)
            return jnp.vdot(weights, ys) + sum(jnp.sum(jnp.sin(h)) for h in jtu.tree_leaves(final))

        return lambda *a: jnp.sum(jax.vmap(loss, (None, 0, None))(*a))

    arguments = (params, xs, state)
    ones = jtu.tree_map(jnp.ones_like, arguments)

    def derivatives(run):
        gradient = jax.jit(jax.grad(losses(run), argnums=(0, 1, 2)))(*arguments)
        return gradient, jax.jit(lambda: jax.jvp(losses(run), arguments, ones)[1])()

    expected = derivatives(by_scan)
    same(derivatives(by_layer), expected, 1e-10)
    again = jax.checkpoint(lambda *a, **k: by_layer(*a, **k))
    same(jax.jit(jax.grad(losses(again)))(*arguments), expected[0][0], 1e-10)


def test_streaming():
    cell, xs = chunked(chunk_length=4), inputs(11)
    rnn = prnn.RNN(cell)
    ys, final = by_layer(cell, xs)
    got, state = [], None
    step = eqx.filter_jit(lambda rnn, x, state: rnn.step(state, x))
    for x in xs:
        y, state = step(rnn, x, rnn.init_state() if state is None else state)
        got.append(y)
    same((jnp.stack(got), state), (ys, final), 1e-12)


def test_solvers_solve_the_steps():
    """A named solver solves the recurrence, of which the chunks are another way."""
    cell, xs = chunked(chunk_length=4), inputs(17)
    for solver in (prnn.Sequential(), prnn.Jacobi(chunk_size=4)):
        run = eqx.filter_jit(lambda cell, xs, solver=solver: prnn.RNN(cell, solver=solver)(xs))
        same(run(cell, xs), by_layer(cell, xs), 1e-12)


def test_one_step_chunks_are_titans():
    cell, xs = chunked(chunk_length=1), inputs(40)
    expected, (memory, momentum) = by_scan(cell.titans, xs)
    ys, final = by_layer(cell, xs)
    same((ys, final[:2]), (expected, (memory, momentum)), 1e-12)
    longer, _ = by_layer(chunked(chunk_length=8), xs)
    assert error(longer, expected) > 1e-3


def test_gradient_of_the_memory():
    cell = prnn.Titans(4, 2, 3, 5, key=KEY)
    k, v = jnp.array([0.6, -0.8]), jnp.array([0.3, 1.0, -2.0])

    def loss(memory):
        first, second = memory
        return jnp.sum((second @ jax.nn.silu(first @ k) - v) ** 2) / 2

    of_hidden, hidden, of_answer = _errors(cell.memory, k, v)
    got = (jnp.outer(of_hidden, k), jnp.outer(of_answer, hidden))
    same(got, jax.grad(loss)(cell.memory), 1e-13)


@pytest.mark.parametrize("kind", ["Titans", "TitansChunked"])
def test_gates_that_underflow(kind):
    """Values and gradients are finite where gates are closed or open to the last bit."""
    cell = prnn.Titans(4, 2, 3, 5, 2, dtype=jnp.float32, key=KEY)
    if kind == "TitansChunked":
        cell = prnn.TitansChunked(4, 2, 3, 5, 2, chunk_length=4, dtype=jnp.float32, key=KEY)
    signs = jnp.asarray(np.sign(np.random.default_rng(0).standard_normal((9, 4))), jnp.float32)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradient(arguments, scale):
        cell, xs = arguments
        gates = lambda c: getattr(c, "titans", c).weight_gates  # noqa: E731
        cell = eqx.tree_at(gates, cell, replace_fn=lambda w: scale * w)
        ys, _ = prnn.RNN(cell)(xs, reset=jnp.arange(9) == 5, throw=False)
        return jnp.sum(jnp.cos(jnp.arange(18, dtype=ys.dtype)) * ys.ravel()), ys

    for scale in (0.0, 1e2, 1e6, 1e30):
        found = gradient((cell, signs), jnp.float32(scale))
        assert all(jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(found))


def test_it_learns_what_it_sees():
    """An association shown again and again is recalled."""
    cell = prnn.Titans(2, 2, 2, 16, max_rate=1.0, key=KEY)
    eye, where = jnp.eye(2), lambda c: (c.weight_q, c.weight_k, c.weight_v, c.weight_o)
    cell = eqx.tree_at(where, cell, (eye, eye, eye, eye))
    gates = lambda c: (c.weight_gates, c.bias_gates)  # noqa: E731
    cell = eqx.tree_at(gates, cell, (jnp.zeros((3, 2)), jnp.array([0.0, 0.0, -30.0])))
    xs = jnp.tile(jnp.array([[0.6, -0.8], [1.0, 0.0]]), (100, 1))
    assert error(by_scan(cell, xs)[0][-2:], xs[-2:]) < 1e-3


@pytest.mark.usefixtures("as_users_run_it")
def test_arguments():
    for make, message in (
        (lambda: prnn.Titans(4, 0, 2, 3, key=KEY), "`key_size` must be at least 1"),
        (lambda: prnn.Titans(4, 2, 2, 0, key=KEY), "`memory_size` must be at least 1"),
        (lambda: prnn.Titans(4, 2, 2, 3, max_rate=0.0, key=KEY), "`max_rate` must be positive"),
        (lambda: prnn.TitansChunked(4, 2, 2, 3, chunk_length=0, key=KEY), "`chunk_length`"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
