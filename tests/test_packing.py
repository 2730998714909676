"""Packed sequences and padding: as running the pieces one by one, in values and gradients."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import error, normal

import pararnn as prnn

LENGTH, SIZE = 14, 3
SOLVERS = {
    "Sequential": prnn.Sequential(),
    "Newton 1": prnn.Newton(chunk_size=1),
    "Newton 4": prnn.Newton(chunk_size=4),
    "Jacobi": prnn.Jacobi(chunk_size=4),
    "QuasiNewton": prnn.QuasiNewton(chunk_size=4),
    "ElementwiseNewton": prnn.ElementwiseNewton(chunk_size=4),
}
over_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
MASKS = {
    "behind": "11111111100000",
    "before": "00001111111111",
    "between": "11011001111010",
    "one": "00000010000000",
    "none": "00000000000000",
    "all": "11111111111111",
}
RESETS = {"no reset": "00000000000000", "resets": "01000010010011"}


def flags(pattern):
    return np.asarray([c == "1" for c in pattern])


# --- solve ------------------------------------------------------------------------------------


def step(weights, h, x):
    """Neither it nor its derivative is finite at an input of 0."""
    return jnp.tanh(weights @ h + jnp.log(x))


def problem():
    """Weights, inputs, the initial state, the state to restart from."""
    xs = jnp.abs(normal(1, (LENGTH, SIZE)))
    return 0.4 * normal(0, (SIZE, SIZE)), xs, normal(2, (SIZE,)), normal(3, (SIZE,))


def by_scan(weights, xs, init, again, reset, mask):
    """All states, by a scan that leaves the state alone in padding; the inputs must be clean."""

    def body(carry, inputs):
        h, pending = carry
        x, r, m = inputs
        pending |= r
        new = step(weights, jnp.where(pending, again, h), x)
        h = jnp.where(m, new, h)
        return (h, pending & ~m), h

    return jax.lax.scan(body, (init, False), (xs, reset, mask))[1]


def loss(states, final):
    return jnp.sum(jnp.sin(3 * states)) + jnp.sum(final**2)


def gradients(run, xs, mask):
    """Of all arguments, and the states, for each of the masks with and without resets."""
    weights, _, init, again = problem()
    resets = jnp.stack([flags(reset) for reset in RESETS.values()])
    gradient = jax.grad(run, (0, 1, 2, 3), has_aux=True)
    over_masks = jax.vmap(gradient, (None, 0, None, None, None, 0))
    over_resets = jax.vmap(over_masks, (None, None, None, None, 0, None))
    return jax.jit(over_resets)(weights, xs, init, again, resets, mask)


@functools.cache
def expected(masks):
    def run(*arguments):
        states = by_scan(*arguments)
        return loss(states, states[-1]), states

    _, xs, _, _ = problem()
    return gradients(run, jnp.broadcast_to(xs, (len(masks), *xs.shape)), jnp.asarray(masks))


@over_solvers
def test_solve(solver):
    """Whatever the padding holds. All masks, with and without resets, in one batch."""
    _, xs, init, _ = problem()
    masks = tuple(map(tuple, map(flags, MASKS.values())))
    keep = np.asarray(masks)
    garbage = jnp.where(keep[..., None], jnp.expand_dims(xs, 0), jnp.nan)

    def run(weights, xs, init, again, reset, mask):
        solution = prnn.solve(
            lambda h, x: step(weights, h, x),
            xs,
            init,
            solver=solver,
            mask=mask,
            reset=reset,
            reset_state=again,
            throw=isinstance(solver, prnn.Newton),
        )
        return loss(solution.states, solution.final), solution.states

    grads, states = gradients(run, garbage, keep)
    expected_grads, expected_states = expected(masks)
    assert error(states, expected_states) <= 1e-10
    some = keep.any(-1)  # else zeros stand in for the inputs, which this step does not bear
    assert np.all(np.asarray(states)[:, ~some] == np.asarray(init))
    for got, other in zip(grads, expected_grads, strict=True):
        assert error(got[:, some], other[:, some]) <= 1e-8
    assert np.all(grads[1][:, some][:, ~keep[some]] == 0)


def test_structure_and_algebra_survive():
    """Padding costs no iterations, and an associative scan still finds its algebra."""
    cell = prnn.MinMax(SIZE, SIZE, key=jax.random.key(0))
    xs = normal(1, (LENGTH, SIZE))
    mask, reset = flags(MASKS["between"]), flags(RESETS["resets"])
    run = eqx.filter_jit(lambda solver: prnn.RNN(cell, solver=solver)(xs, mask=mask, reset=reset))
    assert error(run(prnn.AssociativeScan()), run(prnn.Sequential())) <= 1e-12
    # All but the first 4 steps are padding: the chunks behind them are right at once.
    solution = prnn.solve(
        lambda h, x: jnp.tanh(h + x),
        jnp.ones((400, SIZE)),
        jnp.ones(SIZE),
        solver=prnn.Jacobi(chunk_size=4),
        mask=np.arange(400) < 4,
    )
    assert int(solution.stats.iterations) <= 3 and not solution.stats.fallback


# --- layers -----------------------------------------------------------------------------------


class Both(prnn.AbstractCell):
    """A cell that looks at past inputs, and to which the first step is unlike the others."""

    weight: jax.Array

    @property
    def context(self):
        return 2

    @property
    def sees_starts(self):
        return True

    def init_state(self):
        return jnp.zeros(SIZE)

    def project(self, xs):
        return self.project_with_starts(xs, jnp.arange(len(xs)) == 0)

    def project_with_starts(self, xs, starts):
        seen = prnn.cells.causal_convolution(self.weight, xs)
        return jnp.where(jnp.expand_dims(starts, 1), 3 * seen, seen)

    def step(self, state, u):
        return jnp.tanh(0.7 * state + u)


@functools.cache
def layer(name):
    key = jax.random.key(0)
    cell = {
        "DiagonalGRU": lambda: prnn.DiagonalGRU(SIZE, SIZE, key=key),
        "M2RNN": lambda: prnn.M2RNN(SIZE, 2, 2, 2, SIZE, conv_width=3, key=key),
        "RGLRU": lambda: prnn.RGLRU(SIZE, key=key),
        "Both": lambda: Both(normal(0, (3, SIZE))),
    }[name]()
    rnn = prnn.RNN(cell, learn_init=True)
    return jtu.tree_map(lambda x: x + 0.1 if eqx.is_inexact_array(x) else x, rnn)


def run_pieces(rnn, xs, state, resets, mask):
    """Each piece on its own, without padding; zeros for the outputs of padding."""
    keep = np.flatnonzero(flags(mask))
    piece = np.cumsum(flags(resets))[keep]
    ys = jnp.zeros(xs.shape)
    for number in np.unique(piece):
        index = keep[piece == number]
        out, state = rnn(xs[index], state if number == 0 else None)
        ys = ys.at[index].set(out)
    return ys, state


def carried(rnn, seen=True):
    """Any state to continue from."""
    state, rows = normal(7, rnn.cell.init_state().shape, scale=0.3), rnn.cell.context
    rows, seen = normal(8, (rows, SIZE)), jnp.asarray(seen)
    if not rnn.cell.sees_starts:
        return (state, rows) if len(rows) else state
    return (state, (rows, seen)) if len(rows) else (state, seen)


SEGMENTS = {"one": "00000000000000", "three": "00001000010000"}
CASES = [
    ("DiagonalGRU", "three", "between"),
    ("M2RNN", "three", "all"),
    ("M2RNN", "one", "behind"),
    ("M2RNN", "three", "between"),
    ("RGLRU", "three", "between"),
    ("Both", "three", "between"),
]


@pytest.mark.parametrize("name, resets, mask", CASES)
def test_layer(name, resets, mask):
    """Values, gradients and what is carried along, from a carried state."""
    rnn, resets, mask = layer(name), SEGMENTS[resets], MASKS[mask]
    xs = normal(1, (LENGTH, SIZE))
    garbage = jnp.where(flags(mask)[:, None], xs, jnp.nan)

    def total(run, rnn, xs):
        ys, final = run(rnn, xs, carried(rnn))
        numbers = jtu.tree_leaves(eqx.filter(final, eqx.is_inexact_array))
        return loss(ys, jnp.concatenate([jnp.ravel(x) for x in numbers])), final

    def packed(rnn, xs, state):
        return rnn(xs, state, reset=flags(resets), mask=None if all(flags(mask)) else flags(mask))

    def separate(rnn, xs, state):
        return run_pieces(rnn, xs, state, resets, mask)

    def gradient(run, xs):
        function = eqx.filter_value_and_grad(lambda a: total(run, *a), has_aux=True)
        (value, final), grads = eqx.filter_jit(function)((rnn, xs))
        return value, final, eqx.filter(grads, eqx.is_array)

    got, expected = gradient(packed, garbage), gradient(separate, xs)
    assert error(got[0], expected[0]) <= 1e-10
    assert error(got[1], expected[1]) <= 1e-10
    assert np.all(got[2][1][~flags(mask)] == 0)
    for a, b in zip(*map(jtu.tree_leaves, (got[2], expected[2])), strict=True):
        assert error(a, b) <= 1e-8


@pytest.mark.parametrize("name", ["RGLRU", "Both"])
def test_starts_are_known(name):
    """Whatever comes before the first input, be it padding, a reset, or a state that starts anew,
    and however a sequence is cut: that input alone counts as the first."""
    rnn = prnn.RNN(layer(name).cell)
    xs = normal(1, (6, SIZE))
    run, step = eqx.filter_jit(rnn), eqx.filter_jit(rnn.step)
    ys, final = run(xs)
    goes_on = run(xs, (rnn.cell.init_state(), carried(rnn)[1]))[0]
    assert error(goes_on[0], ys[0]) > 0.1

    # Padding before all, in a call of its own and in the same one.
    nothing, state = run(xs, mask=np.zeros(6, bool))
    assert not nothing.any() and error(state, rnn.init_state(xs[0])) == 0
    assert error(run(xs, state), (ys, final)) <= 1e-12
    padded = jnp.concatenate([jnp.full((2, SIZE), jnp.nan), xs])
    got, last = run(padded, mask=np.arange(8) >= 2)
    assert error((got[2:], last), (ys, final)) <= 1e-12

    # Step by step; in calls that follow each other; anew, after other inputs.
    streamed, state = [], None
    for x in xs:
        y, state = step(state, x)
        streamed.append(y)
    assert error((jnp.stack(streamed), state), (ys, final)) <= 1e-12
    first, state = run(xs[:1])
    second, state = run(xs[1:], state)
    assert error((jnp.concatenate([first, second]), state), (ys, final)) <= 1e-12
    got, last = run(xs, carried(rnn), reset=np.arange(6) == 0)
    assert error((got, last), (ys, final)) <= 1e-12


def test_nothing_but_padding():
    rnn = layer("M2RNN")
    xs, mask = jnp.full((LENGTH, SIZE), jnp.nan), np.zeros(LENGTH, bool)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(rnn):
        ys, final = rnn(xs, carried(rnn), mask=mask, reset=flags(RESETS["resets"]))
        return jnp.sum(ys) + jnp.sum(final[0]), (ys, final)

    (_, (ys, final)), grads = run(rnn)
    assert np.all(ys == 0)
    assert error(final, carried(rnn)) == 0
    assert all(np.all(g == 0) for g in jtu.tree_leaves(eqx.filter(grads, eqx.is_array)))


def test_lengths_and_segments_in_a_batch():
    """The usual way: ids, zero for padding, and a length for each sequence."""
    rnn = layer("DiagonalGRU")
    ids = np.asarray([[1, 1, 1, 2, 2, 0], [5, 5, 7, 7, 7, 7], [3, 0, 0, 0, 0, 0]])
    xs = normal(1, (3, 6, SIZE))
    lengths = np.asarray([5, 6, 1])

    def run(xs, ids, length):
        return rnn(xs, reset=prnn.segment_starts(ids), mask=jnp.arange(6) < length)

    ys, final = eqx.filter_jit(jax.vmap(run))(xs, ids, lengths)
    cuts = [(0, 0, 3), (0, 3, 5), (1, 0, 2), (1, 2, 6), (2, 0, 1)]
    for row, first, last in cuts:
        out, state = rnn(xs[row, first:last])
        assert error(ys[row, first:last], out) <= 1e-10
        if last == lengths[row]:
            assert error(final[row], state) <= 1e-10


def test_empty_sequences():
    for name in ("DiagonalGRU", "M2RNN", "RGLRU", "Both"):
        rnn, none = layer(name), np.zeros(0, bool)
        state = carried(rnn)
        ys, final = rnn(jnp.zeros((0, SIZE)), state, reset=none, mask=none)
        assert ys.shape == (0, SIZE)
        assert error(final, state) == 0


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reset", "mask"])
@pytest.mark.parametrize(
    "value, got",
    [(np.ones(4, int), r"int64 of shape \(4,\)"), (np.ones(3, bool), r"bool of shape \(3,\)")],
)
def test_flags_are_checked(as_users_run_it, name, value, got):
    message = rf"`{name}` must be a boolean array of shape \(4,\).*got {got}"
    if value.dtype != bool:
        message += rf"\. Pass `{name}.astype\(bool\)`"
        message += (
            ".*segment_starts"
            if name == "reset"
            else r" for zeros and ones.*`pararnn.mask_of\(length, 4\)`.$"
        )
    xs = jnp.ones((4, SIZE))
    with pytest.raises(ValueError, match=message):
        prnn.solve(lambda h, x: h + x, xs, jnp.ones(SIZE), **{name: value})
    with pytest.raises(ValueError, match=message):
        layer("DiagonalGRU")(xs, **{name: value})


@pytest.mark.parametrize("ids", [np.ones(3), np.ones((2, 2), int), np.ones(3, bool)])
def test_segment_ids_are_checked(as_users_run_it, ids):
    with pytest.raises(ValueError, match="`segment_ids` must be a one-dimensional array of int"):
        prnn.segment_starts(ids)


def test_segment_starts():
    got = prnn.segment_starts(np.asarray([3, 3, 1, 1, 1, 0, 3]))
    assert got.tolist() == [False, False, True, False, False, True, True]
    assert prnn.segment_starts(np.zeros(0, int)).shape == (0,)


def test_masks_of_lengths():
    of_batches = np.array([0, 3, 5]), np.array([[1, 2], [4, 5]], np.uint8)
    for lengths in (3, np.array(3, np.int8), *of_batches):
        expected = np.arange(5) < np.asarray(lengths)[..., None]
        for mask in (prnn.mask_of(lengths, 5), jax.jit(lambda n: prnn.mask_of(n, 5))(lengths)):
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, expected)
    # Integers that do not reach as far as the sequence.
    assert int(jnp.sum(prnn.mask_of(np.array(200, np.uint8), 300))) == 200
    assert prnn.mask_of(0, 0).shape == (0,)


@pytest.mark.usefixtures("as_users_run_it")
def test_lengths_that_are_none():
    for total in (5.0, True, None):
        with pytest.raises(TypeError, match="`total` must be an integer.*got (5.0|True|None)"):
            prnn.mask_of(3, total)
    for lengths in (3.0, np.ones(5, bool)):
        with pytest.raises(ValueError, match="`lengths` must be integers.*got (float64|bool)"):
            prnn.mask_of(lengths, 5)
    for lengths, wrong in ((6, 6), ([1, -2], -2)):
        with pytest.raises(ValueError, match=f"between 0 and the 5 steps of `total`; got {wrong}"):
            prnn.mask_of(np.array(lengths), 5)
