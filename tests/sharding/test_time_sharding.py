"""Time on several devices: solves and derivatives, against one device."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from time_mesh import (
    INIT,
    LENGTH,
    MASK,
    RESET,
    SIZE,
    WEIGHT,
    XS,
    Elman,
    agrees,
    close,
    diagonal,
    elman,
    latch,
    mesh_of,
)

import pararnn as prnn
from tools.collectives import collectives

SOLVERS = {
    "default": None,
    "newton": prnn.Newton(chunk_size=2),
    "newton, single steps": prnn.Newton(chunk_size=1),
    "jacobi": prnn.Jacobi(chunk_size=3),
    "overlap": prnn.Jacobi(chunk_size=3, overlap=3),
    "quasi-newton": prnn.QuasiNewton(chunk_size=3),
    "elementwise": prnn.ElementwiseNewton(chunk_size=3),
    "damped": prnn.LevenbergMarquardt(chunk_size=3),
    "picard": prnn.Picard(),
    "speculative": prnn.Speculative(chunk_size=3, num_candidates=4),
    "sequential": prnn.Sequential(),
    "associative": prnn.Newton(chunk_size=1, linear_method=prnn.scans.Associative()),
    "radix": prnn.Newton(chunk_size=1, linear_method=prnn.scans.Radix()),
}
ADJOINTS = {
    "default": None,
    "newton": prnn.Newton(chunk_size=3),
    "jacobi": prnn.Jacobi(chunk_size=3),
    "sequential": prnn.Sequential(),
    "step by step": prnn.adjoints.OnePassAdjoint(1),
    "in blocks": prnn.adjoints.OnePassAdjoint(2),
    "clipped": prnn.ClippedAdjoint(1e6, prnn.Newton(chunk_size=3)),
}
# Each solver, adjoint, number of devices and kind of axis; lengths that the devices divide or not,
# and some below their number.
CASES = [
    ("default", "default", 8, "Auto", LENGTH),
    ("default", "newton", 8, "Auto", LENGTH),
    ("default", "jacobi", 4, "Auto", LENGTH),
    ("default", "default", 8, "Auto", 1),
    ("default", "default", 8, "Explicit", 3),
    ("newton", "default", 8, "Explicit", 24),
    ("newton, single steps", "sequential", 2, "Auto", LENGTH),
    ("jacobi", "default", 8, "Auto", 8),
    ("overlap", "step by step", 8, "Auto", LENGTH),
    ("quasi-newton", "clipped", 4, "Auto", 24),
    ("damped", "in blocks", 8, "Auto", LENGTH),
    ("picard", "default", 2, "Explicit", LENGTH),
    ("speculative", "default", 8, "Auto", LENGTH),
    ("sequential", "default", 1, "Auto", LENGTH),
    ("associative", "default", 8, "Auto", LENGTH),
    ("radix", "newton", 8, "Auto", 24),
]


@pytest.mark.parametrize("solver, adjoint, count, kind, length", CASES)
def test_agrees_with_one_device(solver, adjoint, count, kind, length):
    """What raises takes longer to compile: the default solver does."""
    solver, adjoint = SOLVERS[solver], ADJOINTS[adjoint]
    agrees(solver, adjoint, count=count, kind=kind, length=length, throw=solver is None)


@pytest.mark.parametrize("solver", ["default", "speculative"])
def test_resets(solver):
    agrees(SOLVERS[solver], reset=RESET[:LENGTH], reset_state=2 * INIT)


@pytest.mark.parametrize("solver", ["default", "newton"])
def test_resets_and_padding(solver):
    mask, reset = MASK[:LENGTH], RESET[:LENGTH]
    padded = jnp.where(jnp.expand_dims(mask, 1), XS[:LENGTH], jnp.nan)
    agrees(SOLVERS[solver], xs=padded, mask=mask, reset=reset)


def test_all_steps_padded():
    agrees(None, xs=jnp.full((LENGTH, SIZE), jnp.nan), mask=jnp.zeros(LENGTH, bool))


def test_a_guess():
    agrees(SOLVERS["newton"], guess=jnp.ones((LENGTH, SIZE)))


@pytest.mark.parametrize(
    "solver", [None, prnn.Jacobi(chunk_size=1, max_iters=2)], ids=["default", "finish"]
)
def test_a_recurrence_that_does_not_forget(solver):
    """Each device must wait for the one before."""
    seldom = jnp.expand_dims(jnp.arange(24), 1) % 9 == 0
    agrees(solver, xs=jnp.where(seldom, 4 * jnp.sign(XS), 0), step=latch)


def test_the_finish_goes_from_device_to_device():
    with jax.set_mesh(mesh_of(8)):
        solver = prnn.TimeSharded("time", prnn.Jacobi(chunk_size=1, max_iters=2))
        run = prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, solver=solver)
    assert run.stats.fallback and run.result == prnn.RESULTS.successful
    expected = prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, solver=prnn.Sequential())
    close(run.states, expected.states)


def test_a_failure_is_reported():
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
    """A solver that does not support sharding."""

    def solve(self, recurrence, guess, report=None):
        return prnn.Sequential().solve(recurrence, guess, report)

    def solve_affine(self, recurrence):
        return prnn.Sequential().solve_affine(recurrence)


SHARDED = prnn.TimeSharded("time")


@pytest.mark.parametrize(
    "solver, adjoint",
    [
        (Alone(), SHARDED),
        (SHARDED, Alone()),
        (SHARDED, prnn.adjoints.LinearSolveAdjoint(Alone())),
        (SHARDED, prnn.ClippedAdjoint(1.0, Alone())),
    ],
    ids=["solver", "adjoint", "linear solve", "clipped"],
)
def test_solvers_without_sharding_are_refused(solver, adjoint):
    step = functools.partial(elman, WEIGHT)
    with jax.set_mesh(mesh_of(8)), pytest.raises(ValueError, match=r"\(`supports_sharding`\)"):
        prnn.solve(step, XS, INIT, solver=solver, adjoint=adjoint)


def test_a_report_comes_once():
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


def modes(solver, adjoint):
    """First and second derivatives in both modes, and with rematerialisation."""

    def f(t):
        step = functools.partial(elman, t * WEIGHT)
        return jnp.sum(prnn.solve(step, t * XS, INIT, solver=solver, adjoint=adjoint).states ** 3)

    t, one = jnp.asarray(0.9), jnp.asarray(1.0)
    return (
        jax.jvp(f, (t,), (one,)),
        jax.grad(jax.grad(f))(t),
        jax.jvp(jax.grad(f), (t,), (one,)),
        jax.grad(jax.checkpoint(f))(t),
    )


@pytest.mark.parametrize("adjoint", [None, prnn.Newton(chunk_size=3)], ids=["default", "Newton"])
def test_all_modes(adjoint):
    expected = jax.jit(functools.partial(modes, prnn.Sequential(), None))()
    with jax.set_mesh(mesh_of(4)):
        close(jax.jit(functools.partial(modes, SHARDED, adjoint))(), expected)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_within_a_shard_map(kind, check_vma):
    """Each device has its part of the states, and all have the final one."""
    run = functools.partial(prnn.solve, functools.partial(elman, WEIGHT))
    solver = prnn.TimeSharded("time", prnn.Newton(chunk_size=2))

    def local(xs, init):
        solved = run(xs, init, solver=solver)
        return solved.states, solved.final, solved.stats.iterations

    mesh = mesh_of(4, kind)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("time"), P()),
        out_specs=(P("time"), P(), P()),
        check_vma=check_vma,
    )
    xs = jax.device_put(XS, NamedSharding(mesh, P("time")))
    states, final, _ = jax.jit(mapped)(xs, INIT)
    expected = run(XS, INIT, solver=prnn.Sequential())
    close((states, final), (expected.states, expected.final))


@pytest.mark.parametrize(
    "kind, solver, options",
    [
        ("Auto", None, {}),
        ("Auto", prnn.Newton(chunk_size=2), {"spmd_axis_name": "data"}),
        ("Explicit", prnn.Newton(chunk_size=2), {}),
        ("Explicit", None, {"spmd_axis_name": "data"}),
    ],
    ids=["Auto, default", "Auto, Newton, named", "Explicit, Newton", "Explicit, default, named"],
)
def test_a_batch_on_another_axis(kind, solver, options):
    batch = jnp.stack([XS, 2 * XS[::-1], XS - 1, 0 * XS])

    def loss(solver, **options):
        def states(w, xs):
            return prnn.solve(functools.partial(elman, w), xs, INIT, solver=solver).states

        batched = jax.vmap(states, in_axes=(None, 0), **options)
        return jax.jit(jax.value_and_grad(lambda w, xs: jnp.sum(batched(w, xs) ** 3), (0, 1)))

    expected = loss(prnn.Sequential())(WEIGHT, batch)
    mesh = jax.make_mesh((2, 4), ("data", "time"), axis_types=(getattr(AxisType, kind),) * 2)
    xs = jax.device_put(batch, NamedSharding(mesh, P("data", "time")))
    with jax.set_mesh(mesh):
        close(loss(prnn.TimeSharded("time", solver), **options)(WEIGHT, xs), expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_inputs_that_lie_on_a_mesh_need_no_solver(kind):
    xs = jax.device_put(XS, NamedSharding(mesh_of(8, kind), P("time")))
    step = functools.partial(elman, WEIGHT)
    run = prnn.solve(step, xs, INIT)
    close(run.states, prnn.solve(step, XS, INIT, solver=prnn.Sequential()).states)
    assert run.states.sharding.spec[0] == "time"


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_lie_on_the_mesh(kind):
    """Those of a step that is a module."""

    def loss(step, xs, solver):
        return jnp.sum(prnn.solve(step, xs, INIT, solver=solver).states ** 3)

    def run(weight, xs, solver):
        return eqx.filter_jit(eqx.filter_value_and_grad(loss))(Elman(weight), xs, solver)

    expected = run(WEIGHT, XS, prnn.Sequential())
    mesh = mesh_of(8, kind)
    weight = jax.device_put(WEIGHT, NamedSharding(mesh, P()))
    xs = jax.device_put(XS, NamedSharding(mesh, P("time")))
    with jax.set_mesh(mesh):
        got = run(weight, xs, SHARDED)
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


def test_a_state_of_several_types():
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


def test_what_has_forgotten_is_right_at_once():
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


@pytest.mark.parametrize(
    "step, solver, summary",
    [
        (elman, prnn.Newton(chunk_size=4), 5**2 + 5),
        (diagonal, prnn.Newton(chunk_size=4), 2 * 5),
        (elman, prnn.Jacobi(chunk_size=4), None),
    ],
    ids=["dense, Newton", "diagonal, Newton", "Jacobi"],
)
def test_nothing_gathers_the_sequence(step, solver, summary):
    """Devices exchange summaries alone, of as many numbers whatever the length; counted from the
    compiled program."""
    size, item = 5, 8
    weights, init = jnp.zeros((size, size)), jnp.zeros(size)
    short, long = (
        collectives(
            compiled(step, weights, xs, init, prnn.TimeSharded("time", solver), 8).as_text()
        )
        for xs in (jax.ShapeDtypeStruct((length, size), float) for length in (256, 512))
    )
    assert short == long, (short, long)
    turn = [one for one in long if one.loops[-1:] == ("iterations",)]
    large = [one.nbytes for one in turn if one.nbytes > max(size * item, 9 * 4)]
    # One exchange of summaries, and one of what the linearization leaves out, four numbers per
    # element; all else has no more numbers than a state, or a few.
    expected = [4 * size * item] if summary is None else [4 * size * item, summary * item]
    assert sorted(large) == sorted(expected), turn
    assert len(turn) <= (5 if summary is None else 9), turn
    # Where states are judged, the end of a device and what disturbances make of it.
    other = [one for one in long if one not in turn and one.kind != "all-reduce"]
    judging = [one for one in long if one.loops[-1:] == ("attempts",)]
    assert len(judging) <= 3, judging
    assert all(one.nbytes <= 2 * size * item for one in other), other
    assert all(one.nbytes <= (size**2 + size) * item for one in long), long


def test_memory_is_shared(optimised):
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

    share = needed(prnn.TimeSharded("time"), 8) / needed(None, 1)
    assert share <= 1.3 / 8, share


def test_a_mesh_with_that_axis_is_needed():
    with pytest.raises(ValueError, match="needs a mesh with this axis, but there is no mesh"):
        prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, solver=prnn.TimeSharded("time"))


def test_wrong_arguments(as_users_run_it):
    with pytest.raises(TypeError, match="`axis` must be the name"):
        prnn.TimeSharded(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="other than TimeSharded"):
        prnn.TimeSharded("time", prnn.TimeSharded("time"))
    with pytest.raises(ValueError, match="cut time along different axes"):
        solver, adjoint = prnn.TimeSharded("a"), prnn.TimeSharded("b")
        prnn.solve(functools.partial(elman, WEIGHT), XS, INIT, solver=solver, adjoint=adjoint)
