"""Checks that time may lie on several devices; `test_time_sharding.py` runs this file in a process
of its own.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import several_devices
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pararnn as prnn
from benchmarks._collectives import collectives

several_devices.start(8)

SIZE, LENGTH = 3, 21
rng = np.random.default_rng(0)
WEIGHT = jnp.asarray(0.8 * rng.normal(size=(SIZE, SIZE)) / SIZE**0.5)
XS = jnp.asarray(rng.normal(size=(24, SIZE)))
INIT = jnp.asarray(rng.normal(size=SIZE))
RESET = jnp.asarray(rng.random(24) < 0.15)
MASK = jnp.asarray(rng.random(24) < 0.7)
SCALES = jnp.arange(1.0, SIZE + 1)
CHECKS = {}


def check(fn):
    CHECKS[fn.__name__] = fn
    return fn


def mesh_of(count, kind="Auto"):
    kinds = (getattr(AxisType, kind),)
    return jax.make_mesh((count,), ("time",), axis_types=kinds, devices=jax.devices()[:count])


def elman(w, h, x):
    return jnp.tanh(w @ h + x)


def diagonal(w, h, x):
    return jnp.tanh(jnp.diagonal(w) * h + x)


def latch(w, h, x):
    """Never forgets."""
    return jnp.tanh(3 * h + x + 0 * w[0])


def outcome(solver, adjoint=None, step=elman, **options):
    """A loss of all states and the last one, these, and the gradients of the loss."""

    def loss(w, xs, init):
        run = prnn.solve(
            functools.partial(step, w), xs, init, solver=solver, adjoint=adjoint, **options
        )
        total = jnp.sum(run.states**2 * jnp.expand_dims(SCALES, 0)) + jnp.sum(run.final)
        return total, (run.states, run.final, run.result == prnn.RESULTS.successful)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def close(got, expected, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, expected)


@functools.cache
def expected_of(length):
    return outcome(prnn.Sequential(), throw=False)(WEIGHT, XS[:length], INIT)


def agrees(solver, adjoint=None, *, count=8, kind="Auto", length=LENGTH, step=elman, **options):
    """Also in whether it was successful. What raises takes longer: one does, of each kind."""
    throw = options.pop("throw", False)
    if options or step is not elman:
        xs = options.pop("xs", XS[:length])
        expected = outcome(prnn.Sequential(), step=step, throw=False, **options)(WEIGHT, xs, INIT)
    else:
        xs, expected = XS[:length], expected_of(length)
    solver, options = prnn.TimeSharded("time", solver), {**options, "throw": throw}
    with jax.set_mesh(mesh_of(count, kind)):
        close(outcome(solver, adjoint, step, **options)(WEIGHT, xs, INIT), expected)


SOLVERS = {
    "default": None,
    "newton": prnn.Newton(chunk_size=2),
    "newton_of_steps": prnn.Newton(chunk_size=1),
    "jacobi": prnn.Jacobi(chunk_size=3),
    "overlap": prnn.Jacobi(chunk_size=3, overlap=3),
    "quasi_newton": prnn.QuasiNewton(chunk_size=3),
    "damped": prnn.LevenbergMarquardt(chunk_size=3),
    "picard": prnn.Picard(),
    "speculative": prnn.Speculative(chunk_size=3, num_candidates=4),
    "sequential": prnn.Sequential(),
    "associative": prnn.Newton(chunk_size=1, linear_method=prnn.scans.Associative()),
    "radix": prnn.Newton(chunk_size=1, linear_method=prnn.scans.Radix()),
}
for _name, _solver in SOLVERS.items():
    CHECKS[f"solver {_name}"] = functools.partial(agrees, _solver, throw=_solver is None)

ADJOINTS = {
    "newton": prnn.Newton(chunk_size=3),
    "jacobi": prnn.Jacobi(chunk_size=3),
    "sequential": prnn.Sequential(),
    "step by step": prnn.adjoints.OnePassAdjoint(1),
    "in blocks": prnn.adjoints.OnePassAdjoint(2),
    "clipped": prnn.ClippedAdjoint(1e6, prnn.Newton(chunk_size=3)),
}
for _name, _adjoint in ADJOINTS.items():
    CHECKS[f"adjoint {_name}"] = functools.partial(agrees, None, _adjoint)

for _length in (1, 3, 8, 24):
    CHECKS[f"length {_length}"] = functools.partial(agrees, None, length=_length)
for _count in (1, 2, 4):
    CHECKS[f"devices {_count}"] = functools.partial(agrees, None, count=_count)
CHECKS["explicit"] = functools.partial(agrees, None, kind="Explicit", throw=True)
CHECKS["explicit newton"] = functools.partial(agrees, SOLVERS["newton"], kind="Explicit", length=24)


@check
def resets_and_padding():
    mask, reset = MASK[:LENGTH], RESET[:LENGTH]
    padded = jnp.where(jnp.expand_dims(mask, 1), XS[:LENGTH], jnp.nan)
    for solver in (None, SOLVERS["speculative"]):
        agrees(solver, reset=reset, reset_state=2 * INIT)
    for solver in (None, SOLVERS["newton"]):
        agrees(solver, xs=padded, mask=mask, reset=reset)
    agrees(None, xs=jnp.full((LENGTH, SIZE), jnp.nan), mask=jnp.zeros(LENGTH, bool))


@check
def a_guess():
    agrees(SOLVERS["newton"], guess=jnp.ones((LENGTH, SIZE)))


@check
def what_never_forgets():
    """Each device must wait for the one before."""
    seldom = jnp.expand_dims(jnp.arange(24), 1) % 9 == 0
    xs = jnp.where(seldom, 4 * jnp.sign(XS), 0)
    agrees(None, xs=xs[:24], step=latch)
    agrees(prnn.Jacobi(chunk_size=1, max_iters=2), xs=xs[:24], step=latch)


@check
def the_finish_goes_from_device_to_device():
    with jax.set_mesh(mesh_of(8)):
        solver = prnn.TimeSharded("time", prnn.Jacobi(chunk_size=1, max_iters=2))
        run = prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, solver=solver)
    assert run.stats.fallback and run.result == prnn.RESULTS.successful
    expected = prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, solver=prnn.Sequential())
    close(run.states, expected.states)


@check
def a_failure_is_reported():
    solver = prnn.TimeSharded("time", prnn.Jacobi(chunk_size=1, max_iters=2, fallback=False))
    with jax.set_mesh(mesh_of(8)):
        step = functools.partial(elman, WEIGHT)
        run = prnn.solve(step, XS, INIT, solver=solver, throw=False)
        assert run.result == prnn.RESULTS.not_converged
        nan = XS.at[13].set(jnp.nan)
        run = prnn.solve(step, nan, INIT, solver=prnn.TimeSharded("time"), throw=False)
        assert run.result == prnn.RESULTS.nonfinite
        np.testing.assert_array_equal(jnp.isnan(run.states).any(1), jnp.arange(24) >= 13)


class Alone(prnn.AbstractSolver):
    """A solver that knows nothing of other devices."""

    def solve(self, recurrence, guess, report=None):
        return prnn.Sequential().solve(recurrence, guess, report)

    def solve_affine(self, recurrence):
        return prnn.Sequential().solve_affine(recurrence)


@check
def what_knows_nothing_of_other_devices_is_refused():
    def refused(**options):
        try:
            with jax.set_mesh(mesh_of(8)):
                prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, **options)
        except ValueError as error:
            assert "(`supports_sharding`)" in str(error), error
        else:
            raise AssertionError(options)

    time = prnn.TimeSharded("time")
    refused(solver=Alone(), adjoint=time)
    for adjoint in (
        Alone(),
        prnn.adjoints.LinearSolveAdjoint(Alone()),
        prnn.ClippedAdjoint(1.0, Alone()),
    ):
        refused(solver=time, adjoint=adjoint)


@check
def a_report_comes_once():
    calls = []
    with jax.set_mesh(mesh_of(8)):
        solver = prnn.TimeSharded("time", prnn.Newton(chunk_size=1))
        step = functools.partial(elman, WEIGHT)
        run = prnn.solve(
            step, XS, INIT, solver=solver, verbose=lambda *numbers: calls.append(numbers)
        )
        jax.effects_barrier()
    assert len(calls) == run.stats.iterations and {c[3] for c in calls} == {24}
    assert sorted(c[0] for c in calls) == list(range(1, len(calls) + 1))


@check
def all_modes():
    def states(solver, adjoint, t):
        step = functools.partial(elman, t * WEIGHT)
        return jnp.sum(prnn.solve(step, t * XS, INIT, solver=solver, adjoint=adjoint).states ** 3)

    t = jnp.asarray(0.9)

    def modes(solver, adjoint):
        f = functools.partial(states, solver, adjoint)
        one = jnp.ones_like(t)
        return (
            jax.jvp(f, (t,), (one,)),
            jax.grad(jax.grad(f))(t),
            jax.jvp(jax.grad(f), (t,), (one,)),
            jax.grad(jax.checkpoint(f))(t),
        )

    expected = jax.jit(functools.partial(modes, prnn.Sequential(), None))()
    with jax.set_mesh(mesh_of(4)):
        for adjoint in (None, prnn.Newton(chunk_size=3)):
            close(jax.jit(functools.partial(modes, prnn.TimeSharded("time"), adjoint))(), expected)


@check
def within_a_shard_map():
    """With both ways to check its types; each device has its part, and all the final state."""
    run = functools.partial(prnn.solve, functools.partial(elman, WEIGHT))
    solver = prnn.TimeSharded("time", prnn.Newton(chunk_size=2))

    def here(xs, init):
        solved = run(xs, init, solver=solver)
        return solved.states, solved.final, solved.stats.iterations

    for kind in ("Auto", "Explicit"):
        mesh = mesh_of(4, kind)
        for checks in (True, False):
            mapped = jax.shard_map(
                here,
                mesh=mesh,
                in_specs=(P("time"), P()),
                out_specs=(P("time"), P(), P()),
                check_vma=checks,
            )
            xs = jax.device_put(XS, NamedSharding(mesh, P("time")))
            states, final, _ = jax.jit(mapped)(xs, INIT)
            expected = run(XS, INIT, solver=prnn.Sequential())
            close((states, final), (expected.states, expected.final))


@check
def a_batch_on_another_axis():
    batch = jnp.stack([XS, 2 * XS[::-1], XS - 1, 0 * XS])

    def states(solver):
        return lambda w, xs: prnn.solve(functools.partial(elman, w), xs, INIT, solver=solver).states

    def loss(f, **options):
        batched = jax.vmap(f, in_axes=(None, 0), **options)
        return jax.jit(jax.value_and_grad(lambda w, xs: jnp.sum(batched(w, xs) ** 3), (0, 1)))

    expected = loss(states(prnn.Sequential()))(WEIGHT, batch)
    newton, named = prnn.Newton(chunk_size=2), {"spmd_axis_name": "data"}
    for kind, cases in {
        "Auto": ((None, {}), (newton, named)),
        "Explicit": ((newton, {}), (None, named)),
    }.items():
        kinds = (getattr(AxisType, kind),) * 2
        mesh = jax.make_mesh((2, 4), ("data", "time"), axis_types=kinds)
        xs = jax.device_put(batch, NamedSharding(mesh, P("data", "time")))
        for solver, options in cases:
            with jax.set_mesh(mesh):
                f = states(prnn.TimeSharded("time", solver))
                close(loss(f, **options)(WEIGHT, xs), expected)


@check
def inputs_that_lie_on_a_mesh_need_no_solver():
    for kind in ("Auto", "Explicit"):
        xs = jax.device_put(XS, NamedSharding(mesh_of(8, kind), P("time")))
        step = functools.partial(elman, WEIGHT)
        run = prnn.solve(step, xs, INIT)
        close(run.states, prnn.solve(step, XS, INIT, solver=prnn.Sequential()).states)
        assert run.states.sharding.spec[0] == "time"


class Elman(eqx.Module):
    weight: jax.Array

    def __call__(self, h, x):
        return elman(self.weight, h, x)


@check
def weights_lie_on_the_mesh():
    """Of a step that is a module, or a method of one, on explicit axes too."""

    def loss(step, xs, solver):
        return jnp.sum(prnn.solve(step, xs, INIT, solver=solver).states ** 3)

    def run(weight, xs, solver):
        return eqx.filter_jit(eqx.filter_value_and_grad(loss))(Elman(weight), xs, solver)

    expected = run(WEIGHT, XS, prnn.Sequential())
    for kind in ("Auto", "Explicit"):
        mesh = mesh_of(8, kind)
        weight = jax.device_put(WEIGHT, NamedSharding(mesh, P()))
        xs = jax.device_put(XS, NamedSharding(mesh, P("time")))
        with jax.set_mesh(mesh):
            got = run(weight, xs, prnn.TimeSharded("time"))
            assert prnn.select_solver(Elman(weight), xs, INIT)[0].axis == "time"
        close(jax.tree.leaves(got), jax.tree.leaves(expected))


def compiled(step, weights, shapes, init, solver, count):
    """Value and gradient, without running anything. `shapes` are those of the inputs."""

    def loss(weights, xs):
        run = prnn.solve(functools.partial(step, weights), xs, init, solver=solver, throw=False)
        return jnp.sum(run.states**2)

    with jax.set_mesh(mesh_of(count)):
        lies = NamedSharding(mesh_of(count), P("time" if count > 1 else None))
        xs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(weights, xs).compile()


@check
def a_state_of_several_types():
    """What goes to a neighbour goes in one exchange for each type."""

    def step(w, state, x):
        narrow, wide, turning, other = state
        seen = x[: narrow.size] + wide[: narrow.size]
        narrow = jnp.tanh(jnp.float32(0.5) * narrow + seen.astype(jnp.float32))
        wide = jnp.tanh(0.5 * w @ wide + x)
        return narrow, wide, 0.9j * turning + x[0].astype(complex), jnp.tanh(0.5 * other + wide[0])

    init = jnp.zeros(2, jnp.float32), INIT, jnp.ones(3, complex), jnp.zeros((2, 1))

    def states(solver):
        run = functools.partial(prnn.solve, functools.partial(step, WEIGHT), throw=False)
        return jax.jit(lambda xs: run(xs, init, solver=solver).states)

    expected = states(prnn.Sequential())(XS)
    for solver, kind in ((None, "Explicit"), (prnn.Newton(chunk_size=2), "Auto")):
        with jax.set_mesh(mesh_of(8, kind)):
            got = states(prnn.TimeSharded("time", solver))(XS)
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        close(got[:1], expected[:1], atol=1e-5)
        close(got[1:], expected[1:])


@check
def what_has_forgotten_is_right_at_once():
    """Of many elements some are close to zero, and are no more exact than what cancels in them:
    one chunk on each device is enough to tell by how much."""
    size, length = 192, 2 * 160
    draw = np.random.default_rng(1)
    weight = draw.uniform(-1, 1, (size, size)) / size**0.5
    weight, init = jnp.asarray(weight, jnp.float32), jnp.zeros(size, jnp.float32)

    @jax.jit
    def iterations(xs):
        step = functools.partial(elman, weight)
        return prnn.solve(step, xs, init, solver=prnn.TimeSharded("time")).stats.iterations

    with jax.set_mesh(mesh_of(2)):
        for _ in range(40):
            xs = jnp.asarray(draw.normal(size=(length, size)), jnp.float32)
            assert iterations(xs) == 0


@check
def nothing_gathers_the_sequence():
    """All that goes between devices are summaries, whatever the length; counted from the program
    that the compiler made."""
    size, item = 5, 8
    for step, numbers in ((elman, size**2 + size), (diagonal, 2 * size)):
        for solver in (prnn.Newton(chunk_size=4), prnn.Jacobi(chunk_size=4)):
            solver = prnn.TimeSharded("time", solver)
            short, long = (
                collectives(
                    compiled(
                        step,
                        jnp.zeros((size, size)),
                        jax.ShapeDtypeStruct((length, size), float),
                        jnp.zeros(size),
                        solver,
                        8,
                    ).as_text()
                )
                for length in (256, 512)
            )
            assert short == long, (short, long)
            newton = isinstance(solver.solver, prnn.Newton)
            turn = [one for one in long if one.loops[-1:] == ("iterations",)]
            large = [one.nbytes for one in turn if one.nbytes > max(size * item, 9 * 4)]
            # One exchange of summaries, and one of what the linearization leaves out, four numbers
            # per element; all else has no more numbers than a state, or a few.
            expected = [4 * size * item, *[numbers * item] * newton]
            assert sorted(large) == sorted(expected), turn
            assert len(turn) <= (9 if newton else 5), turn
            # Where states are judged, the end of a device and what disturbances make of it.
            other = [one for one in long if one not in turn and one.kind != "all-reduce"]
            judging = [one for one in long if one.loops[-1:] == ("attempts",)]
            assert len(judging) <= 3, judging
            assert all(one.nbytes <= 2 * size * item for one in other), other
            assert all(one.nbytes <= (size**2 + size) * item for one in long), long


@check
def memory_is_shared():
    """A device needs little more than its share of what one device needs."""
    cell = prnn.DiagonalGRU(4, 4, key=jax.random.key(0))
    weights, static = eqx.partition(cell, eqx.is_array)
    us = jax.eval_shape(cell.project, jax.ShapeDtypeStruct((1 << 16, 4), float))

    def step(weights, state, u):
        return eqx.combine(weights, static).step(state, u)

    def needed(solver, count):
        run = compiled(step, weights, us, cell.init_state(), solver, count)
        memory = run.memory_analysis()
        return (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )

    jax.config.update("jax_disable_most_optimizations", False)  # it is they that save memory
    share = needed(prnn.TimeSharded("time"), 8) / needed(None, 1)
    jax.config.update("jax_disable_most_optimizations", True)
    assert share <= 1.3 / 8, share


if __name__ == "__main__":
    several_devices.run_checks(CHECKS)
