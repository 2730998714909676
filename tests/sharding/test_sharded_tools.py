"""Selecting and measuring where time lies on several devices."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from time_mesh import INIT, LENGTH, SIZE, WEIGHT, XS, Elman, elman, mesh_of

import pararnn as prnn
from pararnn.diagnostics import _compare, select_adjoint


def program(layer, xs):
    """What is run for the layer's outputs and their gradient, as text."""

    def loss(layer, xs):
        return jnp.sum(layer(xs, throw=False)[0] ** 2)

    arrays, rest = eqx.partition(layer, eqx.is_array)
    run = jax.value_and_grad(lambda arrays, xs: loss(eqx.combine(arrays, rest), xs))
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(arrays, xs)))


@pytest.mark.parametrize(
    "kind, length, solver, adjoint",
    [("Auto", LENGTH, None, None), ("Explicit", 24, prnn.Newton(), prnn.Newton())],
    ids=["default", "Newton"],
)
def test_what_is_selected_runs(kind, length, solver, adjoint):
    """Passed back, it is the same program."""
    cell, xs = prnn.GRU(SIZE, SIZE, key=jax.random.key(0)), XS[:length]
    with jax.set_mesh(mesh_of(8, kind)):
        asked = prnn.RNN(cell, solver=prnn.TimeSharded("time", solver), adjoint=adjoint)
        selected, reason = prnn.select_solver(asked, xs)
        assert ("128 steps early" if solver is None else "layer was made") in reason
        complete = prnn.RNN(cell, solver=selected, adjoint=select_adjoint(asked, xs)[0])
        assert selected.solver != solver and complete.adjoint != adjoint
        assert program(complete, xs) == program(asked, xs)


def test_what_is_selected_is_that_of_a_part():
    """Wherever the mesh comes from, of whatever devices it is, and where the code runs on each."""
    step = functools.partial(elman, WEIGHT)
    rnn = prnn.RNN(prnn.GRU(SIZE, SIZE, key=jax.random.key(0)))
    part = jax.ShapeDtypeStruct((640, SIZE), float)

    def selected(recurrence, xs):
        init = None if recurrence is rnn else INIT
        solver, reason = prnn.select_solver(recurrence, xs, init, platform="cuda")
        return solver, select_adjoint(recurrence, xs, init, platform="cuda"), reason

    for recurrence in (step, rnn):
        inner, adjoint, _ = selected(recurrence, part)
        for kind in ("Auto", "Explicit"):
            kinds = (getattr(AxisType, kind),)
            for mesh in (mesh_of(8, kind), AbstractMesh((64,), ("time",), axis_types=kinds)):
                lies = NamedSharding(mesh, P("time"))
                xs = jax.ShapeDtypeStruct((640 * mesh.size, SIZE), float, sharding=lies)
                solver, here, reason = selected(recurrence, xs)
                assert solver == prnn.TimeSharded("time", inner) and here == adjoint
                assert f"20 chunks of 32 steps on each of {mesh.size} devices" in reason
    layer = prnn.RNN(rnn.cell, solver=prnn.TimeSharded("time"))
    with jax.sharding.use_abstract_mesh(AbstractMesh((64,), ("time",))):
        xs = jax.ShapeDtypeStruct((640 * 64, SIZE), float)
        solver, _ = prnn.select_solver(layer, xs, platform="cuda")
    assert solver == prnn.TimeSharded("time", inner)
    seen = []

    def on_each(xs):
        seen.append(prnn.select_solver(layer, xs, platform="cuda")[0])
        return xs

    mapped = jax.shard_map(on_each, mesh=mesh_of(8), in_specs=P("time"), out_specs=P("time"))
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((640 * 8, SIZE), float))
    assert seen == [solver]


def test_selecting_refuses_what_solving_does():
    cell = prnn.GRU(SIZE, SIZE, key=jax.random.key(0))
    along = NamedSharding(mesh_of(8), P("time"))
    lying = jax.ShapeDtypeStruct(XS.shape, XS.dtype, sharding=along)
    for solver, xs, message in (
        (prnn.TimeSharded("time"), XS, "needs a mesh with this axis, but there is no mesh"),
        (prnn.TimeSharded("space"), lying, "the mesh has the axes"),
        (prnn.Newton(), lying, "Use `solver=pararnn.TimeSharded"),
    ):
        for select in (prnn.select_solver, select_adjoint):
            with pytest.raises(ValueError, match=re.escape(message)):
                select(prnn.RNN(cell, solver=solver), xs)


def benchmarked(*args, **options):
    """A benchmark; and by mesh (of one device: None), where the inputs of its runs lay."""
    compiled, lay = _compare._compiled, {}

    def spy(function, inputs, costs, mesh):
        lay.setdefault(mesh, set()).update(x.sharding for x in jax.tree.leaves(inputs))
        return compiled(function, inputs, costs, mesh)

    _compare._compiled = spy
    try:
        return prnn.benchmark(*args, **options, repetitions=1, progress=False), lay
    finally:
        _compare._compiled = compiled


def test_a_benchmark_of_several_devices():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharded = prnn.TimeSharded("time"), prnn.TimeSharded("time", prnn.Newton(chunk_size=1))
    for kind, length in (("Auto", LENGTH), ("Explicit", 24)):
        mesh = mesh_of(8, kind)
        whole, along = (NamedSharding(mesh, spec) for spec in (P(), P("time")))
        with jax.set_mesh(mesh):
            measured, lay = benchmarked(Elman(WEIGHT), XS[:length], INIT, solvers=[None, *sharded])
        assert lay[None] == {one}, lay
        assert whole in lay[mesh] and (along in lay[mesh]) == (length % 8 == 0), lay
        names = [row.name for row in measured.rows]
        assert names[-1] == "TimeSharded(axis='time', solver=Newton(chunk_size=1))"
        assert all(row.agrees and row.gradient_error < 1e-12 for row in measured.rows)
        on_mesh = [row.name.startswith("TimeSharded") for row in measured.rows]
        assert on_mesh == [row.forward.flops is None for row in measured.rows]
        assert on_mesh == [False, True, True] and "TimeSharded" in str(measured)


def test_a_benchmark_of_inputs_that_lie_on_several_devices():
    xs = jax.device_put(XS, NamedSharding(mesh_of(8, "Explicit"), P("time")))
    rnn = prnn.RNN(prnn.DiagonalGRU(SIZE, SIZE, key=jax.random.key(0)))
    found, lay = benchmarked(rnn, xs, gradient=False, costs=False)
    solvers = [row.solver for row in found.rows]
    assert solvers[-2:] == [prnn.TimeSharded("time"), prnn.TimeSharded("time", prnn.Newton())]
    assert len(solvers) > 4 and len(lay) == 2 and all(row.agrees for row in found.rows)


def test_a_benchmark_of_a_batch():
    solvers = [prnn.TimeSharded("time", prnn.Newton(chunk_size=1))]
    with jax.set_mesh(mesh_of(8)):
        found, _ = benchmarked(Elman(WEIGHT), XS, INIT, solvers=solvers, batch_size=3, costs=False)
    assert found.rows[0].agrees


def test_a_benchmark_takes_devices():
    options = {"solvers": [prnn.TimeSharded("time")], "progress": False}
    message = "needs a mesh with this axis, but there is no mesh"
    with pytest.raises(ValueError, match=message):
        prnn.tune(Elman(WEIGHT), XS, INIT, **options)
    with jax.sharding.use_abstract_mesh(AbstractMesh((8,), ("time",))):
        with pytest.raises(ValueError, match="takes a mesh of devices"):
            prnn.tune(Elman(WEIGHT), XS, INIT, **options)
