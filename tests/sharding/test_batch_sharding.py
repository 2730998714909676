"""A batch that is spread over several devices, with gradients, against one device."""

import contextlib
import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pararnn as prnn

BATCH, LENGTH, SIZE = 8, 14, 2
rng = np.random.default_rng(0)
WEIGHT = 0.7 * rng.normal(size=(SIZE, SIZE))
XS, COTANGENTS = rng.normal(size=(2, BATCH, LENGTH, SIZE))
INIT = rng.normal(size=(BATCH, SIZE))
RESET = rng.random((BATCH, LENGTH)) < 0.15
MASK = np.arange(LENGTH) < np.array([14, 11, 14, 5, 14, 14, 2, 13])[:, None]
DATA = (XS, INIT, COTANGENTS, RESET, MASK)


def dense(w, h, x):
    return jnp.tanh(w @ h + x)


def diagonal(w, h, x):
    return jnp.tanh(jnp.diagonal(w) * h + x)


def affine(w, h, x):
    return 0.5 * (jnp.tanh(w) @ h) + x


def solution(solver, step, adjoint=None):
    def one(w, xs, init, reset, mask):
        bound = functools.partial(step, w)
        options = {"solver": solver, "adjoint": adjoint, "reset": reset, "mask": mask}
        # What raises is compiled anew in each run: a kind of spreading has one that does.
        options["throw"] = solver is None or isinstance(solver, prnn.Newton)
        solved = prnn.solve(bound, xs, init, **options)
        return solved.states, solved.stats.iterations

    return one


def scan(step):
    def one(w, xs, init, reset, mask):
        def body(carry, inputs):
            h, pending = carry
            x, flag, keep = inputs
            pending |= flag
            new = step(w, jnp.where(pending, init, h), x)
            h = jnp.where(keep, new, h)
            return (h, pending & ~keep), h

        start = (init, jnp.asarray(False))
        return jax.lax.scan(body, start, (xs, reset, mask))[1], jnp.asarray(0)

    return one


def loss(one, **vmap_options):
    """`(w, *data) -> (loss, (states, iterations))` of a batch."""

    def batched(w, xs, init, cotangents, reset, mask):
        run = jax.vmap(one, in_axes=(None, 0, 0, 0, 0), **vmap_options)
        states, iterations = run(w, xs, init, reset, mask)
        return jnp.sum(cotangents * states**2), (states, iterations)

    return batched


def with_gradients(fn):
    return jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True)


@functools.cache
def expected(step):
    return jax.jit(with_gradients(loss(scan(step))))(jnp.asarray(WEIGHT), *map(jnp.asarray, DATA))


def make_mesh(count, kind=AxisType.Explicit):
    return jax.make_mesh((count,), ("batch",), axis_types=(kind,), devices=jax.devices()[:count])


def put(tree, mesh, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


# --- ways to spread a batch over devices ---------------------------------------------------------


def on_mesh(one, mesh, *, context=True, jit=True, **vmap_options):
    """Arrays on a mesh, and JAX finds out the rest."""
    fn = with_gradients(loss(one, **vmap_options))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        w = put(WEIGHT, mesh, P()) if context else jnp.asarray(WEIGHT)
        return (jax.jit(fn) if jit else fn)(w, *put(DATA, mesh, P("batch")))


def in_shard_map(one, mesh, *, grads, check_vma=True):
    """Manual axes: gradients are taken `"outside"`; `"inside"`, where JAX sums those of what all
    devices share; or inside of weights that were made to `"vary"`, or without JAX's types, and then
    summed by hand."""
    local = loss(one)

    def total(w, *data):
        value, aux = local(w, *data)
        return jax.lax.psum(value, "batch"), aux

    def inside(w, *data):
        if grads == "vary":
            w = jax.lax.pcast(w, "batch", to="varying")
        (value, aux), (dw, *others) = with_gradients(local)(w, *data)
        if grads == "vary" or not check_vma:
            dw = jax.lax.psum(dw, "batch")
        return (jax.lax.psum(value, "batch"), aux), (dw, *others)

    specs = {"mesh": mesh, "in_specs": (P(), *[P("batch")] * 5), "check_vma": check_vma}
    values = (P(), P("batch"))
    if grads == "outside":
        fn = with_gradients(jax.shard_map(total, out_specs=values, **specs))
    else:
        out_specs = (values, (P(), P("batch"), P("batch")))
        fn = jax.shard_map(inside, out_specs=out_specs, **specs)
    return jax.jit(fn)(put(WEIGHT, mesh, P()), *put(DATA, mesh, P("batch")))


def in_pmap(one, count):
    def inside(w, *data):
        (value, aux), (dw, *others) = with_gradients(loss(one))(w, *data)
        return (jax.lax.psum(value, "batch"), aux), (jax.lax.psum(dw, "batch"), *others)

    split = [x.reshape(count, BATCH // count, *x.shape[1:]) for x in DATA]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fn = jax.pmap(
            inside, axis_name="batch", in_axes=(None, *[0] * 5), devices=jax.devices()[:count]
        )
        (value, aux), (dw, *others) = fn(WEIGHT, *split)
    join = functools.partial(jax.tree.map, lambda x: x.reshape(BATCH, *x.shape[2:]))
    return (value[0], join(aux)), (dw[0], *join(others))


# --- tests ---------------------------------------------------------------------------------------


def assert_close(got, want):
    got, want = (jax.tree.map(np.asarray, jax.device_get(t)) for t in (got, want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


def explicit(count, **options):
    return lambda one: on_mesh(one, make_mesh(count), **options)


def auto(count, **options):
    return lambda one: on_mesh(one, make_mesh(count, AUTO), **options)


def manual(count, **options):
    return lambda one: in_shard_map(one, make_mesh(count), **options)


associative = prnn.Newton(chunk_size=4, linear_method=prnn.scans.Associative())
CASES = {
    "explicit, one device": (explicit(1), dense, prnn.Sequential(), None),
    "explicit without set_mesh": (explicit(2, context=False), diagonal, prnn.Newton(), None),
    "explicit, eager": (explicit(2, jit=False), diagonal, prnn.Newton(chunk_size=4), None),
    "explicit, Jacobi": (explicit(2), dense, prnn.Jacobi(), prnn.Newton()),
    "explicit, affine": (explicit(4), affine, prnn.AssociativeScan(), prnn.AssociativeScan()),
    "auto without set_mesh": (auto(4, context=False), dense, associative, None),
    "auto, spmd_axis_name": (
        auto(2, spmd_axis_name="batch"),
        diagonal,
        prnn.QuasiNewton(),
        None,
    ),
    "manual, Picard": (
        manual(2, grads="vary"),
        dense,
        prnn.Picard(),
        prnn.Jacobi(chunk_size=4),
    ),
    "manual, Levenberg-Marquardt": (
        manual(4, grads="outside"),
        diagonal,
        prnn.LevenbergMarquardt(chunk_size=2, linear_method=prnn.scans.Associative()),
        None,
    ),
    "manual, Speculative": (
        manual(2, grads="outside"),
        dense,
        prnn.Speculative(num_candidates=4),
        None,
    ),
    "manual, affine": (
        manual(4, grads="inside"),
        affine,
        prnn.AssociativeScan(linear_method=prnn.scans.Radix()),
        prnn.Newton(chunk_size=4),
    ),
    "manual without types": (
        manual(4, grads="inside", check_vma=False),
        dense,
        prnn.QuasiNewton(chunk_size=2),
        None,
    ),
    "pmap": (lambda one: in_pmap(one, 2), dense, prnn.Newton(chunk_size=4), None),
}


def agrees(spread, step, solver, adjoint=None):
    """Returns the iterations of each sequence."""
    (value, (states, iterations)), gradients = spread(solution(solver, step, adjoint))
    (want, (want_states, _)), want_gradients = expected(step)
    assert_close((value, states), (want, want_states))
    assert_close(gradients, want_gradients)
    return iterations


@pytest.mark.parametrize("spread, step, solver, adjoint", CASES.values(), ids=CASES)
def test_agrees_with_one_device(spread, step, solver, adjoint):
    agrees(spread, step, solver, adjoint)


@pytest.mark.parametrize(
    "spread", [explicit(4), manual(4, grads="inside")], ids=["explicit", "manual"]
)
def test_each_sequence_iterates_as_alone(spread):
    solver = prnn.Newton(chunk_size=2)
    run = jax.jit(jax.vmap(solution(solver, dense), in_axes=(None, 0, 0, 0, 0)))
    alone = run(WEIGHT, XS, INIT, RESET, MASK)[1]
    assert len(set(alone.tolist())) > 1
    np.testing.assert_array_equal(agrees(spread, dense, solver), alone)


def test_clipped():
    one = solution(associative, dense, prnn.ClippedAdjoint(0.5))
    alone = jax.jit(with_gradients(loss(one)))(WEIGHT, *DATA)[1]
    assert_close(manual(2, grads="inside")(one)[1], alone)
    assert np.max(np.abs(alone[0] - expected(dense)[1][0])) > 1e-3, "nothing was clipped"


@pytest.mark.parametrize(
    "cell, solver",
    [
        (prnn.GRU(SIZE, 3, key=jax.random.key(0)), prnn.Newton(chunk_size=4)),
        (prnn.MinMax(SIZE, 3, key=jax.random.key(0)), prnn.AssociativeScan()),
    ],
    ids=["GRU", "MinMax"],
)
def test_training(cell, solver):
    """Two steps of gradient descent, in shard_map and on explicit axes, against one device."""
    rnn = prnn.RNN(cell, solver=solver, learn_init=True)
    weights, static = eqx.partition(rnn, eqx.is_inexact_array)

    def mean_loss(weights, xs):
        ys = jax.vmap(lambda x: eqx.combine(weights, static)(x)[0])(xs)
        return jnp.mean(jnp.square(ys - 1))

    def update(weights, value, grads):
        return jax.tree.map(lambda w, g: w - 0.5 * g, weights, grads), value

    def alone(weights, xs):
        return update(weights, *jax.value_and_grad(mean_loss)(weights, xs))

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(4),
        in_specs=(P(), P("batch")),
        out_specs=(P(), P()),
    )
    def manual(weights, xs):
        own = jax.lax.pcast(weights, "batch", to="varying")
        out = jax.lax.pmean(jax.value_and_grad(mean_loss)(own, xs), "batch")
        return update(weights, *out)

    def train(step, place):
        step = jax.jit(step)
        trained = place(weights, P())
        for _ in range(2):
            trained, value = step(trained, place(XS, P("batch")))
        return trained, value

    want = train(alone, lambda tree, spec: tree)
    on_four = functools.partial(put, mesh=make_mesh(4))
    assert_close(train(manual, lambda tree, spec: on_four(tree, spec=spec)), want)
    with jax.set_mesh(make_mesh(4)):
        assert_close(train(alone, lambda tree, spec: on_four(tree, spec=spec)), want)


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_nothing_gathers_the_batch(kind):
    mesh = make_mesh(4, kind)
    with jax.set_mesh(mesh):
        fn = jax.jit(loss(solution(prnn.Newton(chunk_size=4), dense)))
        lowered = fn.lower(put(WEIGHT, mesh, P()), *put(DATA, mesh, P("batch")))
        text = lowered.compile().as_text()
    found = re.findall(
        r"= (\S+?)(?:\{\S*)? (all-reduce|all-gather|all-to-all|collective-permute)", text
    )
    assert found, "no collective was found: no test"
    for shape, name in found:
        assert re.fullmatch(r"\w+\[\]", shape), f"{name} of {shape} on {kind} axes"


def test_what_is_shared_and_what_is_not():
    """Flags and inputs that all sequences share, and constants as initial states."""
    shared = {"reset": RESET[0], "mask": MASK[1]}

    def vary_inputs(x):
        return prnn.solve(
            functools.partial(dense, WEIGHT), x, np.zeros(SIZE), solver=associative, **shared
        ).states

    def vary_starts(h):
        return prnn.solve(
            functools.partial(dense, WEIGHT), XS[0], h, solver=prnn.Jacobi(max_iters=1), **shared
        ).states

    mesh = make_mesh(4)
    for fn, data in ((vary_inputs, XS), (vary_starts, INIT)):
        want, placed = jax.jit(jax.vmap(fn))(data), put(data, mesh, P("batch"))
        assert_close(jax.jit(jax.vmap(fn))(placed), want)
        local = jax.shard_map(jax.vmap(fn), mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
        assert_close(jax.jit(local)(placed), want)


def test_some_axes_manual_and_others_not():
    def fn(x):
        step = functools.partial(dense, WEIGHT)
        return prnn.solve(step, x, np.zeros(SIZE), solver=associative).states

    mesh = jax.make_mesh((2, 2), ("batch", "model"), axis_types=(AUTO, AUTO))
    with jax.set_mesh(mesh):
        local = jax.shard_map(
            jax.vmap(fn), in_specs=P("batch"), out_specs=P("batch"), axis_names={"batch"}
        )
        assert_close(jax.jit(local)(put(XS, mesh, P("batch"))), jax.jit(jax.vmap(fn))(XS))


few = prnn.Newton(chunk_size=2, max_iters=1, fallback=False)


def failing(w, xs):
    """A sum over the batch, which needs a collective, of sequences that do not all converge."""

    def fn(x):
        return prnn.solve(functools.partial(dense, 3 * w), x, np.zeros(SIZE), solver=few).states

    return jnp.sum(jax.vmap(fn)(xs))


def test_an_error_stops_all_devices():
    mesh = make_mesh(4)
    local = jax.shard_map(
        lambda w, xs: jax.lax.psum(failing(w, xs), "batch"),
        mesh=mesh,
        in_specs=(P(), P("batch")),
        out_specs=P(),
    )
    for fn, on in ((local, mesh), (failing, make_mesh(4, AUTO))):
        xs = put(XS * (np.arange(BATCH) == 5)[:, None, None], on, P("batch"))  # one lane alone
        with pytest.raises(RuntimeError, match="did not converge"):
            jax.block_until_ready(jax.jit(jax.grad(fn))(put(WEIGHT, on, P()), xs))


def test_on_explicit_axes_failure_is_not_a_number():
    mesh = make_mesh(4)
    with jax.set_mesh(mesh):
        out = jax.jit(jax.value_and_grad(failing))(
            put(WEIGHT, mesh, P()), put(XS, mesh, P("batch"))
        )
    assert all(np.isnan(x).all() for x in jax.tree.leaves(jax.device_get(out)))


def test_time_is_not_sharded():
    mesh, step = make_mesh(2), functools.partial(dense, WEIGHT)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="`xs` is sharded along its leading"):
        xs = put(XS[0], mesh, P("batch"))
        prnn.solve(step, xs, np.zeros(SIZE), solver=prnn.Newton())


def test_a_step_that_communicates():
    """Recurrent normalisation over a batch on four devices."""

    def step(h, x):
        return jnp.tanh(WEIGHT @ h + x - jax.lax.pmean(h, "batch"))

    def local(xs, solver=None):
        states = prnn.solve(step, xs[0], np.zeros(SIZE), solver=solver).states
        return jax.lax.psum(jnp.sum(COTANGENTS[0] * states**2), "batch")

    def together(xs):
        def body(h, x):
            h = jnp.tanh(h @ WEIGHT.T + x - jnp.broadcast_to(jnp.mean(h, 0), h.shape))
            return h, h

        states = jax.lax.scan(body, np.zeros((4, SIZE)), jnp.swapaxes(xs, 0, 1))[1]
        return jnp.sum(COTANGENTS[0][:, None] * states**2)

    mesh = make_mesh(4)
    on_four = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("batch"), out_specs=P())
    xs = put(XS[:4], mesh, P("batch"))
    got = jax.jit(jax.value_and_grad(on_four(local)))(xs)
    assert_close(got, jax.jit(jax.value_and_grad(together))(XS[:4]))
    newton = functools.partial(local, solver=prnn.Newton())
    with pytest.raises(ValueError, match="exchanges values along"):
        jax.jit(on_four(newton))(xs)
