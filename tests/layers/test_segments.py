"""Outputs in segments, without all states: the numbers of the whole, for less memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import error, normal

import pararnn as prnn
from pararnn.cells._chunk_maps import MatrixAlgebra
from pararnn.diagnostics import temporary_bytes
from pararnn.layers._chunked import apply_chunks_parallel, parallel_segment_size
from pararnn.layers._segmented import default_segment_size

LENGTH, INPUTS = 23, 3
KEY = jax.random.key(0)
CELL = prnn.M2RNN(INPUTS, 2, 4, 2, key=KEY)
XS = normal(1, (LENGTH, INPUTS))
RESET = jnp.asarray(np.random.default_rng(2).random(LENGTH) < 0.15)
MASK = jnp.asarray(np.random.default_rng(3).random(LENGTH) < 0.7)


class Doubling(prnn.cells.AbstractChunkedCell):
    """Affine, and through several steps at once."""

    rate: jax.Array
    chunk_size = 4

    def init_state(self):
        return jnp.zeros(2)

    def step(self, state, u):
        return self.rate * state + u

    def readout(self, states, us):
        return 2 * states

    def apply_chunk(self, state, us, reset):
        def one(state, inputs):
            u, anew = inputs
            state = self.step(jnp.where(anew, 0, state), u)
            return state, state

        reset = jnp.zeros(len(us), bool) if reset is None else reset
        state, states = jax.lax.scan(one, state, (us, reset))
        return state, self.readout(states, us)


class Mixing(Doubling):
    """The same, whose chunks are known to compose."""

    chunk_algebra = MatrixAlgebra()

    def init_state(self):
        return jnp.zeros((1, 2, 1))

    def step(self, state, u):
        return jnp.expand_dims(self.rate, 2) * state + jnp.expand_dims(u, (0, 2))

    def chunk_factor(self, us, reset):
        kept = jnp.expand_dims(self.rate, 2) ** len(us)
        return kept if reset is None else jnp.where(jnp.any(reset), 0, kept)


def outcome(rnn, xs, state=None, **options):
    """Outputs, what follows, and the gradient of both."""

    def loss(args):
        rnn, xs, state = args
        ys, final = rnn(xs, state, throw=False, **options)
        total = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(final))
        return total + jnp.sum(ys**2), (ys, final)

    run = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    return jax.tree.leaves(eqx.filter(run((rnn, xs, state)), eqx.is_array))


NEWTON = prnn.Newton(chunk_size=4)
BOTH = {"reset": RESET, "mask": MASK}


@pytest.mark.parametrize(
    "solver, options",
    [
        pytest.param(None, {}, id="default-plain"),
        pytest.param(None, {"reset": RESET}, id="default-reset"),
        pytest.param(None, {"mask": MASK}, id="default-mask"),
        pytest.param(None, BOTH, id="default-reset and mask"),
        pytest.param(NEWTON, {}, id="Newton-plain"),
        pytest.param(NEWTON, BOTH, id="Newton-reset and mask"),
    ],
)
def test_segments_give_the_numbers_of_the_whole(solver, options):
    learned = bool(options)
    whole, parts = (
        prnn.RNN(CELL, solver=solver, learn_init=learned, segment_size=size) for size in (LENGTH, 7)
    )
    assert error(outcome(parts, XS, **options), outcome(whole, XS, **options)) <= 1e-10


def test_all_may_be_padding():
    nothing = jnp.zeros(LENGTH, bool)
    ys, (final, past) = eqx.filter_jit(prnn.RNN(CELL, segment_size=7))(XS, mask=nothing)
    assert not jnp.any(ys) and error(final, CELL.init_state()) == 0 and not jnp.any(past)


@pytest.mark.parametrize("length", [1, 4, 10, 12])
def test_a_cell_goes_through_chunks(length):
    """Chunks that are full and that are not; a state to continue from; a batch."""
    cell, xs = Doubling(jnp.array([0.9, -0.5])), normal(4, (length, 2))
    state = jnp.ones(2)
    for options in ({}, {"mask": MASK[:length]}, {"reset": RESET[:length]}):
        chunked = outcome(prnn.RNN(cell), xs, state, **options)
        assert error(
            chunked, outcome(prnn.RNN(cell, solver=prnn.Sequential()), xs, state, **options)
        ) < (1e-12)
    assert "chunks of 4 steps" in prnn.select_solver(cell, xs)[1]
    assert "chunks of 4" not in prnn.select_solver(prnn.RNN(cell, solver=prnn.Sequential()), xs)[1]
    ys, _ = jax.jit(jax.vmap(prnn.RNN(cell)))(jnp.stack([xs, 2 * xs]))
    assert error(ys[1], 2 * ys[0]) <= 1e-12  # linear
    assert error(ys[0], prnn.RNN(cell)(xs)[0]) <= 1e-12


def test_a_learned_state_is_started_from_within_chunks():
    cell, xs = Doubling(jnp.array([0.9, -0.5])), normal(4, (LENGTH, 2))
    layer = prnn.RNN(cell, learn_init=True)
    layer = eqx.tree_at(lambda r: r.learned_state, layer, jnp.array([3.0, 4.0]))
    expected = prnn.solve(cell.step, xs, layer.learned_state, reset=RESET, solver=prnn.Sequential())
    assert error(layer(xs, reset=RESET)[0], 2 * expected.states) <= 1e-12


def test_only_large_states_are_left_out():
    def size(cell):
        us = jax.eval_shape(cell.project, jax.ShapeDtypeStruct((1, 4), float))
        return default_segment_size(cell.init_state(), us, 10_000)

    assert size(prnn.GRU(4, 8, key=KEY)) == 10_000
    assert size(prnn.M2RNN(4, 2, 64, 16, key=KEY)) == 100


def test_memory_is_that_of_some_states(optimised):
    length, cell = 4096, prnn.M2RNN(4, 2, 16, 16, dtype=jnp.float32, key=KEY)
    xs = jax.ShapeDtypeStruct((length, 4), jnp.float32)
    arrays, static = eqx.partition(cell, eqx.is_array)

    def states_needed(size):
        def loss(arrays, xs):
            layer = prnn.RNN(eqx.combine(arrays, static), segment_size=size)
            return jnp.sum(layer(xs, throw=False)[0] ** 2)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        needed = temporary_bytes(run.lower(arrays, xs).compile())
        assert needed is not None
        return needed / cell.init_state().nbytes

    assert states_needed(length) >= length
    # The states between 64 segments, and those of one a few times over.
    assert states_needed(64) <= 64 + 10 * 64


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_wrong_sizes_are_refused(size, as_users_run_it):
    with pytest.raises((TypeError, ValueError), match="`segment_size`"):
        prnn.RNN(CELL, segment_size=size)


def test_a_segment_that_overflows_is_told_of():
    layer, xs = prnn.RNN(CELL, segment_size=7), XS.at[9].set(jnp.inf)
    with pytest.raises(eqx.EquinoxRuntimeError, match="not finite"):
        layer(xs)
    with pytest.raises(Exception, match="not finite"):
        jax.block_until_ready(jax.jit(lambda xs: layer(xs)[0])(xs))
    assert not jnp.all(jnp.isfinite(layer(xs, throw=False)[0]))


# --- many chunks in parallel ------------------------------------------------------------------

WHOLE = 4 * 64 + 9
# One of each way to say what is left of a state: by rows, by a matrix, and those with an algebra of
# their own. Based and PLSTM say it as Mamba2 does, the other delta rules as DeltaProduct.
CELLS = {
    "GatedLinearAttention": prnn.GatedLinearAttention,
    "Mamba2": prnn.Mamba2,
    "Retention": prnn.Retention,
    "DeltaProduct": prnn.DeltaProduct,
    "MLSTM": prnn.MLSTM,
    "Aaren": prnn.Aaren,
}


@pytest.mark.parametrize("name", CELLS)
def test_parallel_chunks(name):
    """As one after another; with starts anew, some of them between chunks."""
    cell = CELLS[name](INPUTS, 2, 4, 3, key=KEY)
    xs = normal(4, (WHOLE, INPUTS))
    reset = jnp.zeros(WHOLE, bool).at[jnp.asarray([5, 64, 100, 101, 192])].set(True)
    before = prnn.RNN(cell)(xs[:7])[1]
    state = before[0] if cell.context else before

    def one_by_one(cell, state, us, reset):
        size, outputs = cell.chunk_size, []
        for first in range(0, WHOLE, size):
            some = jax.tree.map(lambda x, n=first: x[n : n + size], (us, reset))
            state, ys = cell.apply_chunk(state, *some)
            outputs.append(ys)
        return state, jnp.concatenate(outputs)

    def results(run, reset):
        def loss(args):
            cell, xs, state = args
            state, ys = run(cell, state, cell.project(xs), reset)
            total = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(state))
            return total + jnp.sum(jnp.cos(ys)), (state, ys)

        return eqx.filter_value_and_grad(loss, has_aux=True)((cell, xs, state))

    run = eqx.filter_jit(lambda way: results(way, reset))
    got, expected = (
        jax.tree.leaves(eqx.filter(run(way), eqx.is_array))
        for way in (apply_chunks_parallel, one_by_one)
    )
    assert error(got, expected) <= 1e-11


@pytest.mark.parametrize(
    "options, length",
    [({}, 3), ({}, 4), ({}, 23), ({"reset": True}, 24), ({"mask": True, "reset": True}, 23)],
)
def test_accelerators_apply_chunks_in_parallel(length, options, monkeypatch):
    cell = Mixing(jnp.asarray([[0.5, 0.1]]))
    flags = {"reset": RESET, "mask": MASK}
    options = {name: jnp.resize(flags[name], length) for name in options}
    xs = normal(5, (length, 2))
    expected = outcome(prnn.RNN(cell), xs, **options)
    monkeypatch.setattr("pararnn.layers._chunked.chosen_platform", lambda _: "gpu")
    monkeypatch.setattr("pararnn.layers._chunked._PARALLEL_CHUNKS", 2)
    assert error(outcome(prnn.RNN(cell), xs, **options), expected) <= 1e-12


def test_sizes_of_parallel_segments():
    assert [parallel_segment_size(n, 64) for n in (65, 4096, 4097, 8192)] == [
        128,
        4096,
        33 * 64,
        4096,
    ]
