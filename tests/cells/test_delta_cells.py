"""Delta rules, and attention as a recurrence: chunks of steps by products of matrices."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import error, normal

import pararnn as prnn
from pararnn._misc import bool_where
from pararnn.cells._delta_rule import DeltaInputs, delta_chunk, delta_step

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
CELLS = {
    "DeltaNet": lambda **k: prnn.DeltaNet(4, 2, 3, 5, **k),
    "DeltaNet, not gated": lambda **k: prnn.DeltaNet(
        4, 2, 3, 5, gated=False, negative_eigenvalues=True, **k
    ),
    "DeltaProduct": lambda **k: prnn.DeltaProduct(4, 2, 3, 5, num_factors=3, **k),
    "TTTLinear": lambda **k: prnn.TTTLinear(4, 2, 3, 5, max_rate=2.0, **k),
    "Aaren": lambda **k: prnn.Aaren(4, 2, 3, 5, **k),
}
each_cell = pytest.mark.parametrize("name", CELLS)
TOLERANCES = {jnp.float32: 1e-5, jnp.float64: 1e-10}


def make(name, dtype=jnp.float64):
    """With decays from 1e-6 or less to nearly 1, and scores of attention as far apart."""
    cell = CELLS[name](dtype=dtype, key=KEY)
    if getattr(cell, "weight_alpha", None) is not None:
        where = lambda c: (c.weight_alpha, c.a_log, c.bias_alpha)  # noqa: E731
        weight = 6 * normal(5, (2, 4), dtype)
        return eqx.tree_at(where, cell, (weight, jnp.zeros(2, dtype), jnp.zeros(2, dtype)))
    if isinstance(cell, prnn.Aaren):
        return eqx.tree_at(lambda c: c.query, cell, 9 * normal(5, (2, 3), dtype))
    return cell


def some_state(cell):
    """One that steps lead to."""
    us = cell.project(normal(8, (3, 4), cell.weight_o.dtype))
    step = lambda h, u: (cell.step(h, u), None)  # noqa: E731
    return jax.lax.scan(step, cell.init_state(), us)[0]


def scanned(cell, xs, state, reset=None, mask=None):
    """Step by step."""
    us, initial, length = cell.project(xs), cell.init_state(), len(xs)
    reset = jnp.zeros(length, bool) if reset is None else reset
    mask = jnp.ones(length, bool) if mask is None else mask

    def step(carry, inputs):
        (state, waits), (u, anew, real) = carry, inputs
        anew = anew | waits
        new = cell.step(bool_where(anew, initial, state), u)
        # A reset within padding holds for the next real step.
        return (bool_where(real, new, state), anew & ~real), new

    (final, _), states = jax.lax.scan(step, (state, jnp.asarray(False)), (us, reset, mask))
    return jnp.where(jnp.expand_dims(mask, 1), cell.readout(states, us), 0), final


def chunked(cell, xs, state, reset=None, mask=None):
    return prnn.RNN(cell)(xs, state, reset=reset, mask=mask, throw=False)


def flags(length):
    """Where to start anew, and what is real."""
    rng = np.random.default_rng(11)
    return jnp.asarray(rng.random(length) < 0.03), jnp.asarray(rng.random(length) < 0.9)


def value_and_gradients(run):
    """With respect to parameters, inputs and the state before."""

    @eqx.filter_jit
    def both(arguments, *args):
        @functools.partial(eqx.filter_value_and_grad, has_aux=True)
        def loss(arguments):
            outputs = run(*arguments, *args)
            terms = [
                jnp.vdot(jnp.cos(jnp.arange(x.size, dtype=x.dtype)), jnp.sin(x.ravel()))
                for x in jtu.tree_leaves(outputs)
            ]
            return sum(terms), outputs

        (_, outputs), gradients = loss(arguments)
        return outputs, eqx.filter(gradients, eqx.is_array)

    return both


# --- chunks are the steps ---------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_lengths(name, dtype):
    cell = make(name, dtype)
    # The delta rules have their chunks in common: one of them meets all lengths, with no flags too.
    every = name in ("DeltaProduct", "Aaren")
    for length in (1, 63, 64, 4097) if every else (4097,):
        xs = normal(1, (length, 4), dtype)
        plain = ((),) if every else ()
        for args in (*plain, flags(length)) if length > 64 else plain:
            got, expected = (
                eqx.filter_jit(run)(cell, xs, cell.init_state(), *args)
                for run in (chunked, scanned)
            )
            assert error(got, expected) <= TOLERANCES[dtype]


@each_cell
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients(name, dtype):
    """Also from a state to continue from, with resets and padding."""
    cell = make(name, dtype)
    xs = normal(1, (1000, 4), dtype)
    arguments = (cell, xs, some_state(cell))
    args = flags(1000)
    got = value_and_gradients(chunked)(arguments, *args)
    expected = value_and_gradients(scanned)(arguments, *args)
    assert error(got[0], expected[0]) <= TOLERANCES[dtype]
    if dtype == jnp.float64:
        assert error(got[1], expected[1]) <= TOLERANCES[dtype]
        return
    # Each rounds in its own way, and some sums cancel.
    _, exact = value_and_gradients(scanned)(cast(arguments, jnp.float64), *args)
    of_scan, of_chunks = (error(cast(x[1], jnp.float64), exact) for x in (expected, got))
    assert of_chunks <= max(2 * of_scan, TOLERANCES[dtype])


def cast(tree, dtype):
    return jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


@pytest.mark.parametrize("name", ["DeltaProduct", "TTTLinear", "Aaren"])
def test_transformations(name):
    """Batches, derivatives of second order in both modes, and recomputation. A delta network is one
    of products with a single factor, by the same code."""
    cell, xs, direction = make(name), normal(2, (2, 70, 4)), normal(3, (2, 70, 4))

    @eqx.filter_jit
    def all_of(cell, xs, direction, run):
        @jax.checkpoint
        def loss(x):
            ys, final = run(cell, x, cell.init_state())
            return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(h)) for h in jtu.tree_leaves(final))

        second = lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))  # noqa: E731
        return jax.vmap(second)(xs, direction), jax.jvp(jax.vmap(loss), (xs,), (direction,))

    got, expected = (all_of(cell, xs, direction, run) for run in (chunked, scanned))
    assert error(got, expected) <= 1e-10


@each_cell
def test_streaming(name):
    rnn, xs = prnn.RNN(make(name)), normal(4, (70, 4))

    @eqx.filter_jit
    def stream(rnn, xs):
        step = lambda state, x: rnn.step(state, x)[::-1]  # noqa: E731
        final, ys = jax.lax.scan(step, rnn.init_state(), xs)
        return ys, final

    assert error(eqx.filter_jit(rnn)(xs, throw=False), stream(rnn, xs)) <= 1e-12


@pytest.mark.parametrize("name", [name for name in CELLS if "DeltaNet" not in name])
def test_named_solver(name):
    """The associative scan, with resets and padding, is what the steps are."""
    cell, xs = make(name), normal(6, (70, 4))
    reset, mask = flags(70)
    rnn = prnn.RNN(cell, solver=prnn.AssociativeScan())
    got = eqx.filter_jit(rnn)(xs, reset=reset, mask=mask, throw=False)
    expected = eqx.filter_jit(scanned)(cell, xs, cell.init_state(), reset, mask)
    assert error(got, expected) <= 1e-12


# --- delta rules ------------------------------------------------------------------------------


def repeated(beta, dtype, length=64, alpha=1.0):
    """Chunks whose keys are but two, which repeat."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 1, 4))
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    k = keys[(np.arange(length) > 40).astype(int)]
    q, v = rng.standard_normal((2, length, 1, 4))
    rates = [np.full((length, 1), x) for x in (beta, alpha)]
    q, k, v, beta, alpha = (jnp.asarray(x, dtype) for x in (q, k, v, *rates))
    return DeltaInputs(q, [k], [v], [beta], alpha)


@pytest.mark.parametrize("beta", [1.0, 1.7, 2.0])
def test_repeated_keys(beta):
    """Where powers of the triangular matrix have entries of up to 1e15."""

    @functools.partial(jax.jit, static_argnums=1)
    def both(us, steps):
        state = jnp.ones((1, 4, 4), us.query.dtype)
        if not steps:
            return delta_chunk(state, us, None)
        step = lambda h, u: (delta_step(h, u),) * 2  # noqa: E731
        final, states = jax.lax.scan(step, state, us)
        return final, jnp.einsum("lnk,lnkv->lnv", us.query, states)

    got, of_steps = (both(repeated(beta, jnp.float32), steps) for steps in (False, True))
    exact = cast(both(repeated(beta, jnp.float64), True), jnp.float32)
    assert error(got, exact) <= 1e-5 and error(of_steps, exact) <= 1e-5
    got, of_steps = (both(repeated(beta, jnp.float64), steps) for steps in (False, True))
    assert error(got, of_steps) <= 1e-13


@pytest.mark.parametrize("alpha", [0.0, 1e-42, 1e-38, 1e-6])
def test_closed_gates(alpha):
    """Nothing is lost or infinite where decays underflow, within a step or within a chunk."""
    us = repeated(0.7, jnp.float32, alpha=alpha)
    us = us._replace(alpha=us.alpha.at[10:30].set(1.0))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def chunk(us, state):
        outputs = delta_chunk(state, us, None)
        return sum(jnp.sum(jnp.sin(x)) for x in outputs), outputs

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def steps(us, state):
        step = lambda h, u: (delta_step(h, u),) * 2  # noqa: E731
        final, states = jax.lax.scan(step, state, us)
        outputs = final, jnp.einsum("lnk,lnkv->lnv", us.query, states)
        return sum(jnp.sum(jnp.sin(x)) for x in outputs), outputs

    state = jnp.ones((1, 4, 4), jnp.float32)
    ((_, got), grads), ((_, expected), expected_grads) = (f(us, state) for f in (chunk, steps))
    assert error(got, expected) <= 1e-5
    assert all(jnp.all(jnp.isfinite(g)) for g in jtu.tree_leaves(grads))
    assert error(grads, expected_grads) <= 1e-5


def test_one_correction_is_delta_net():
    product = prnn.DeltaProduct(4, 2, 3, 5, num_factors=1, negative_eigenvalues=False, key=KEY)
    net = prnn.DeltaNet(4, 2, 3, 5, key=jax.random.key(1, impl="unsafe_rbg"))
    names = [f"weight_{x}" for x in ("q", "k", "v", "alpha", "beta", "o")] + ["a_log", "bias_alpha"]
    where = lambda c: [getattr(c, name) for name in names]  # noqa: E731
    weights = [w.reshape(v.shape) for w, v in zip(where(product), where(net), strict=True)]
    net, xs = eqx.tree_at(where, net, weights), normal(0, (9, 4))
    assert error(prnn.RNN(product)(xs), prnn.RNN(net)(xs)) <= 1e-14


def test_gradient_descent_from_zero_is_delta_net():
    net = prnn.DeltaNet(4, 2, 3, 5, gated=False, key=KEY)
    ttt = prnn.TTTLinear(4, 2, 3, 5, key=jax.random.key(1, impl="unsafe_rbg"))
    where = lambda c: (c.weight_q, c.weight_k, c.weight_v, c.weight_rate, c.weight_o)  # noqa: E731
    # A delta network divides its queries by the root of the size of keys, 3.
    weight_o = 3**-0.5 * net.weight_o
    weights = (net.weight_q, net.weight_k, net.weight_v, net.weight_beta, weight_o)
    ttt = eqx.tree_at(where, ttt, weights)
    ttt = eqx.tree_at(lambda c: c.weight_start, ttt, jnp.zeros((2, 3, 5)))
    xs = normal(0, (9, 4))
    assert error(prnn.RNN(ttt)(xs), prnn.RNN(net)(xs)) <= 1e-14


def test_parity():
    """A reflection along one key at each one, and none at a zero: with a β of 2 the memory's sign
    tells how many there were."""
    bits = np.random.default_rng(0).integers(0, 2, 500)
    key = jnp.ones((500, 1, 1))
    beta = jnp.asarray(2.0 * bits).reshape(500, 1)
    us = DeltaInputs(key, [key], [jnp.zeros((500, 1, 1))], [beta], None)
    state, found = jnp.ones((1, 1, 1)), []
    chunk = jax.jit(delta_chunk)
    for first in range(0, 500, 50):
        part = jtu.tree_map(lambda u: u[first : first + 50], us)  # noqa: B023
        state, ys = chunk(state, part, None)
        found.append(ys.ravel())
    np.testing.assert_allclose(np.concatenate(found), (-1.0) ** np.cumsum(bits), rtol=1e-12)


def test_gate_and_rates():
    cell = prnn.DeltaNet(4, 2, 3, 5, gated=False, negative_eigenvalues=True, key=KEY)
    assert cell.weight_alpha is None and cell.a_log is None and cell.bias_alpha is None
    xs = 9 * normal(0, (50, 4))
    us, plain = cell.project(xs), prnn.DeltaNet(4, 2, 3, 5, key=KEY).project(xs)
    assert us.alpha is None and jnp.array_equal(us.betas[0], 2 * plain.betas[0])
    assert jnp.max(us.betas[0]) > 1.9
    ttt = prnn.TTTLinear(4, 2, 3, 5, max_rate=0.5, key=KEY)
    assert jnp.max(ttt.project(100 * xs).betas[0]) == 0.5


# --- attention --------------------------------------------------------------------------------


def test_attention_algebra():
    algebra = prnn.AttentionAlgebra()
    cell = make("Aaren")
    us = cell.project(normal(0, (4, 4)))
    f1, f2, f3 = (algebra.element(jtu.tree_map(lambda u, t=t: u[t], us)) for t in range(3))
    state = some_state(cell)
    forget = algebra.constant(state)
    compose, apply = algebra.compose, algebra.apply
    for first, second, third in ((f1, f2, f3), (f1, forget, f3), (forget, f2, forget)):
        expected = apply(third, apply(second, apply(first, cell.init_state())))
        for whole in (
            compose(compose(third, second), first),
            compose(third, compose(second, first)),
        ):
            assert error(apply(whole, cell.init_state()), expected) <= 1e-14
    assert error(apply(forget, cell.init_state()), state) == 0


def test_attention_is_no_worse_for_far_scores():
    """Over a range of scores in which exponentials overflow, both ways."""
    cell = eqx.tree_at(lambda c: c.query, make("Aaren", jnp.float32), replace_fn=lambda q: 100 * q)
    xs = normal(0, (200, 4), jnp.float32)
    got, gradients = value_and_gradients(chunked)((cell, xs, cell.init_state()))
    assert np.ptp(cell.project(xs)[0]) > 1000
    assert all(jnp.all(jnp.isfinite(g)) for g in jtu.tree_leaves(gradients))
    wide = cast(cell, jnp.float64)
    expected = scanned(wide, cast(xs, jnp.float64), wide.init_state())
    assert error(cast(got[0], jnp.float64), expected[0]) <= 1e-3  # of scores of 1e3 ± 1e-4


def test_nothing_to_attend_to():
    """Outputs and derivatives of padding alone."""
    cell, xs = make("Aaren"), normal(0, (5, 4))
    mask = jnp.zeros(5, bool)
    arguments = (cell, xs, cell.init_state())
    got, gradients = value_and_gradients(chunked)(arguments, jnp.zeros(5, bool), mask)
    assert not got[0].any()
    assert all(jnp.all(jnp.isfinite(g)) for g in jtu.tree_leaves(gradients))


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prnn.DeltaProduct(4, 2, 3, 5, num_factors=0, key=KEY), "`num_factors` must be at"),
        (lambda: prnn.DeltaProduct(4, 0, 3, 5, key=KEY), "`num_heads` must be at least 1; got 0"),
        (lambda: prnn.TTTLinear(4, 2, 3, -5, key=KEY), "`value_size` must be at least 1; got -5"),
        (
            lambda: prnn.TTTLinear(4, 2, 3, 5, max_rate=0.0, key=KEY),
            r"`max_rate` must be in \(0, 2\]",
        ),
        (
            lambda: prnn.TTTLinear(4, 2, 3, 5, max_rate=2.1, key=KEY),
            r"`max_rate` must be in \(0, 2\]",
        ),
        (lambda: prnn.Aaren(4, 2, 0, 5, key=KEY), "`key_size` must be at least 1; got 0"),
        (lambda: prnn.Aaren(4, 2, 3, 5, 0, key=KEY), "`output_size` must be at least 1; got 0"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("as_users_run_it")
def test_numbers():
    with pytest.raises(TypeError, match="`max_rate` must be a Python number; got '1'"):
        prnn.TTTLinear(4, 2, 3, 5, max_rate="1", key=KEY)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`norm_eps` must be a Python number; got None"):
        prnn.DeltaNet(4, 2, 3, 5, norm_eps=None, key=KEY)  # pyright: ignore[reportArgumentType]
