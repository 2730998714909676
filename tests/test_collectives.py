"""Steps that exchange values with the other sequences of a batch: right or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import error, normal, scan

import pararnn as prnn
from pararnn._step_properties import shared_axes

BATCH, LENGTH, SIZE = 3, 8, 2
ARGS = normal(0, (SIZE, SIZE)), normal(1, (BATCH, LENGTH, SIZE)), normal(2, (BATCH, SIZE))


def normalised(w, h, x):
    """Recurrent batch normalisation."""
    z = w @ h + x
    mean = jax.lax.pmean(z, "batch")
    variance = jax.lax.pmean((z - mean) ** 2, "batch")
    return jnp.tanh((z - mean) / jnp.sqrt(variance + 0.1) + 0.3 * x)


def over_batch(run, step=normalised):
    """`(w, xs, init) -> states` of the batch."""

    def states(w, xs, init):
        one = functools.partial(run, functools.partial(step, w))
        return jax.vmap(one, axis_name="batch")(xs, init)

    return states


def loss(states):
    return jnp.sum(jnp.cos(jnp.arange(float(states.size))).reshape(states.shape) * states**2)


def solved(**options):
    return lambda step, xs, init: prnn.solve(step, xs, init, **options).states


@pytest.mark.parametrize("adjoint", [None, prnn.Sequential()], ids=["default", "Sequential"])
@pytest.mark.parametrize("solver", [None, prnn.Sequential()], ids=["default", "Sequential"])
def test_one_step_after_another_is_right(solver, adjoint):
    """Values, gradients and directional derivatives."""

    def all_of(run):
        states = over_batch(run)
        gradient = jax.grad(lambda *args: loss(states(*args)), argnums=(0, 1, 2))
        return states(*ARGS), gradient(*ARGS), jax.jvp(states, ARGS, ARGS)[1]

    ours, expected = (
        jax.jit(functools.partial(all_of, run))()
        for run in (solved(solver=solver, adjoint=adjoint), scan)
    )
    assert error(ours, expected) <= 1e-10


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"solver": solver}
            for solver in (
                prnn.Newton(),
                prnn.Newton(chunk_size=1),
                prnn.QuasiNewton(),
                prnn.Jacobi(),
                prnn.Picard(),
                prnn.LevenbergMarquardt(),
                prnn.Speculative(),
                prnn.AssociativeScan(),
            )
        ),
        *(
            {"adjoint": adjoint}
            for adjoint in (
                prnn.Newton(),
                prnn.Jacobi(),
                prnn.AssociativeScan(),
                prnn.ClippedAdjoint(1e9),
                prnn.ClippedAdjoint(1e9, prnn.Newton()),
            )
        ),
    ],
    ids=str,
)
def test_all_else_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"`{name}=\w+\(…\)`.*axis 'batch': use `{name}=None`"):
        over_batch(solved(**options))(*ARGS)


@pytest.mark.parametrize(
    "exchange",
    [
        lambda h: jax.lax.pmean(h, "batch"),
        lambda h: jnp.sum(jax.lax.all_gather(h, "batch"), 0),
        lambda h: jax.lax.ppermute(h, "batch", [(i, (i + 1) % BATCH) for i in range(BATCH)]),
        lambda h: jax.lax.stop_gradient(jax.lax.pmax(h, "batch")),
        lambda h: jax.lax.psum_scatter(jnp.stack([h] * BATCH), "batch"),
        jax.jit(
            lambda h: jax.lax.cond(h[0] > 0, lambda h: h, lambda h: jax.lax.psum(h, "batch"), h)
        ),
        lambda h: jax.lax.scan(lambda h, _: (jax.lax.pmean(h, "batch"), None), h, None, 2)[0],
    ],
    ids=[
        "pmean",
        "all_gather",
        "ppermute",
        "pmax",
        "psum_scatter",
        "within jit and cond",
        "within scan",
    ],
)
def test_kinds_of_exchange(exchange):
    def step(w, h, x):
        return jnp.tanh(0.3 * exchange(h) + x)

    with pytest.raises(ValueError, match="exchanges values along the axis 'batch'"):
        over_batch(solved(solver=prnn.Newton()), step)(*ARGS)
    got, expected = (over_batch(run, step)(*ARGS) for run in (solved(), scan))
    assert error(got, expected) <= 1e-12


def test_what_is_no_exchange():
    """The number of the sequence; a batch within the step; a named axis that the step ignores."""

    def step(w, h, x):
        number = jax.lax.axis_index("batch").astype(float)
        rows = jax.vmap(lambda r: jax.lax.pmean(r, "row") - r, axis_name="row")(
            w * jnp.expand_dims(h, 0)
        )
        return jnp.tanh(x + 0.1 * number + 0.3 * jnp.sum(rows, 0))

    method = solved(solver=prnn.Newton(chunk_size=1), adjoint=prnn.Newton(chunk_size=2))
    got, expected = (
        jax.jit(
            jax.grad(lambda *args, run=run: loss(over_batch(run, step)(*args)), argnums=(0, 1))
        )(*ARGS)
        for run in (method, scan)
    )
    assert error(got, expected) <= 1e-10


def test_off_the_cpu_it_is_solved_one_step_after_another():
    chosen = []

    def choose(step, xs, init):
        chosen.append(prnn.select_solver(step, xs, init, platform="gpu"))
        return init

    over_batch(choose)(*ARGS)
    ((solver, reason),) = chosen
    assert solver == prnn.Sequential() and "along the axis 'batch'" in reason


def test_masks_are_refused():
    """They bring different steps of the sequences together."""
    mask = np.arange(LENGTH) % 3 > 0
    with pytest.raises(ValueError, match="`mask` moves.*along the axis 'batch'"):
        over_batch(solved(mask=mask))(*ARGS)

    class Cell(prnn.AbstractCell):
        def init_state(self):
            return jnp.zeros(SIZE)

        def step(self, state, u):
            return jnp.tanh(jax.lax.pmean(state, "batch") + u)

    rnn = prnn.RNN(Cell())
    with pytest.raises(ValueError, match="`mask` moves.*along the axis 'batch'"):
        jax.vmap(lambda xs: rnn(xs, mask=mask)[0], axis_name="batch")(ARGS[1])
    got = jax.vmap(lambda xs: rnn(xs)[0], axis_name="batch")(ARGS[1])
    zeros = jnp.zeros((BATCH, SIZE))
    assert (
        error(got, over_batch(scan, lambda w, h, u: Cell().step(h, u))(None, ARGS[1], zeros))
        <= 1e-12
    )


def test_verify_says_that_it_cannot():
    """It runs one sequence."""
    w, xs, init = ARGS
    with pytest.raises(ValueError, match="`verify` runs one sequence.*axis of the state"):
        prnn.verify(functools.partial(normalised, w), xs[0], init[0])


def test_the_remedy():
    """With the batch in the state, every method is right."""
    w, xs, init = ARGS

    def step(w, h, x):
        z = h @ w.T + x
        mean = jnp.mean(z, 0, keepdims=True)
        variance = jnp.mean((z - mean) ** 2, 0, keepdims=True)
        return jnp.tanh((z - mean) / jnp.sqrt(variance + 0.1) + 0.3 * x)

    def gradient(run):
        def of(w, xs, init):
            states = run(functools.partial(step, w), jnp.swapaxes(xs, 0, 1), init)
            return loss(jnp.swapaxes(states, 0, 1))

        return jax.jit(jax.grad(of, argnums=(0, 1, 2)))(*ARGS)

    expected = jax.grad(lambda *args: loss(over_batch(scan)(*args)), argnums=(0, 1, 2))(*ARGS)
    method = solved(solver=prnn.Newton(chunk_size=2), adjoint=prnn.Newton(chunk_size=2))
    assert error(gradient(method), expected) <= 1e-9


def test_axes_of_a_mesh():
    """Within `shard_map`, where arrays are declared to vary, which is no exchange."""
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("device")
    found = {}

    def sharded(f):
        return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)

    def look(x):
        found["exchange"] = shared_axes(lambda h, x: h + jax.lax.pmean(x, "device"), x, x)
        found["none"] = shared_axes(lambda h, x: h * x + jnp.ones_like(x), x, x)
        return x

    x = normal(3, (1, SIZE))
    sharded(look)(x)
    found["within"] = shared_axes(
        lambda h, x: h + sharded(lambda x: x - jax.lax.pmean(x, "device"))(x), x, x
    )
    assert found == {"exchange": ("device",), "none": (), "within": ()}
