"""What a user adds in a file of their own, by public names: solvers, a structure, a scan, an
adjoint, and a rule for a primitive."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.interpreters import ad, batching, mlir
from systems import normal, scan

import pararnn as prnn

L, D = 50, 3
XS, INIT = normal(0, (L, D)), normal(1, (D,))
WEIGHT = normal(2, (D, D), scale=0.3)


def elman(weight, h, x):
    return jnp.tanh(weight @ h + x)


def states_and_gradient(step, params, **options):
    """By `pararnn.solve`, and by the plain scan if nothing is given."""

    def loss(params, xs, init):
        if options:
            solution = prnn.solve(lambda h, x: step(params, h, x), xs, init, throw=False, **options)
            states, stats = solution.states, solution.stats
        else:
            states, stats = scan(lambda h, x: step(params, h, x), xs, init), None
        return jnp.sum(jnp.sin(states)), (states, stats)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (states, stats)), gradient = grad(params, XS, INIT)
    return states, gradient, stats


def agrees(step, params, **options):
    states, gradient, stats = states_and_gradient(step, params, **options)
    expected, expected_gradient, _ = states_and_gradient(step, params)
    np.testing.assert_allclose(states, expected, rtol=1e-9, atol=1e-10)
    for a, b in zip(jtu.tree_leaves(gradient), jtu.tree_leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    return stats


# --- solvers ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Unrolled(prnn.AbstractSolver):
    """A direct solver: the scan, so many steps per turn."""

    unroll: int = 4
    lies: bool = False

    def solve(self, recurrence, guess, report=None):
        states = self.solve_affine(recurrence)
        length = recurrence.length
        stats = prnn.Stats(
            iterations=jnp.asarray(1),
            correction=jnp.zeros((), jnp.float32),
            chunk_size=length,
            sequential_steps=jnp.asarray(length),
            fallback=jnp.asarray(False),
        )
        return states, jnp.asarray(not self.lies), stats

    def solve_affine(self, recurrence):
        def body(state, x):
            state = recurrence.step(state, x)
            return state, state

        return jax.lax.scan(body, recurrence.init, recurrence.xs, unroll=self.unroll)[1]


@dataclasses.dataclass(frozen=True)
class Shortened(Unrolled):
    def solve(self, recurrence, guess, report=None):
        states, *rest = Unrolled.solve(self, recurrence, guess, report)
        return jtu.tree_map(lambda s: s[1:], states), *rest


def test_a_direct_solver():
    stats = agrees(elman, WEIGHT, solver=Unrolled())
    assert stats.iterations == 1
    agrees(elman, WEIGHT, solver=Unrolled(), adjoint=Unrolled(unroll=2))
    agrees(elman, WEIGHT, solver=prnn.Newton(chunk_size=5), adjoint=Unrolled())


def test_a_direct_solver_with_everything_else():
    """Resets, padding, batches and a clipped derivative are not the solver's business."""
    keep = jnp.arange(L) % 7 != 3
    reset = jnp.arange(L) % 11 == 5

    def run(xs, solver):
        adjoint = prnn.ClippedAdjoint(0.3, solver)
        options = {"solver": solver, "adjoint": adjoint, "mask": keep, "reset": reset}
        solution = prnn.solve(lambda h, x: elman(WEIGHT, h, x), xs, INIT, **options)
        return jnp.sum(jnp.sin(solution.states)), solution.states

    batch = jnp.stack([XS, -XS])
    got, expected = (
        jax.vmap(jax.grad(lambda xs, s=solver: run(xs, s), has_aux=True))(batch)
        for solver in (Unrolled(), prnn.Sequential())
    )
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_direct_solver_that_reports_a_failure():
    step = lambda h, x: elman(WEIGHT, h, x)  # noqa: E731
    failed = prnn.solve(step, XS, INIT, solver=Unrolled(lies=True), throw=False)
    assert failed.result == prnn.RESULTS.not_converged
    with pytest.raises(RuntimeError, match="did not converge"):
        prnn.solve(step, XS, INIT, solver=Unrolled(lies=True))


def test_a_direct_solver_that_returns_other_shapes():
    step = lambda h, x: elman(WEIGHT, h, x)  # noqa: E731
    with pytest.raises(ValueError, match=r"`Shortened.solve` must return states.*length 50"):
        prnn.solve(step, XS, INIT, solver=Shortened())


def test_a_direct_solver_in_the_tools():
    cell = prnn.GRU(D, D, key=jax.random.key(0))
    assert prnn.verify(cell, XS, solver=Unrolled())
    assert prnn.select_solver(prnn.RNN(cell, solver=Unrolled()), XS)[0] == Unrolled()


def test_a_solver_must_do_both():
    class Half(prnn.AbstractSolver):
        def solve(self, recurrence, guess, report=None):
            raise NotImplementedError

    with pytest.raises(TypeError, match="solve_affine"):
        Half()  # pyright: ignore[reportAbstractUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxed(prnn.solvers.AbstractIterativeSolver):
    """Jacobi's iteration, moving only a part of the way: an own correction and an own state."""

    factor: float = 0.8

    def linearization(self, structure, size):
        return prnn.solvers.Linearization.zero()

    def default_chunk_size(self, structure, length, size):
        return 10

    def init(self, chunks, starts):
        return jnp.asarray(0)

    def correct(self, chunks, point, state):
        starts = point.starts + self.factor * point.defects
        return prnn.solvers.Correction(point, starts, state + 1)


def test_an_iterative_solver_with_its_own_correction():
    stats = agrees(elman, WEIGHT, solver=Relaxed())
    assert 1 < stats.iterations and stats.chunk_size == 10 and not stats.fallback
    # Nothing that it corrects wrongly gets through.
    far = agrees(elman, WEIGHT, solver=Relaxed(factor=-3.0, max_iters=3))
    assert far.fallback


def test_an_iterative_solver_as_adjoint_is_always_finished():
    agrees(elman, WEIGHT, adjoint=Relaxed(factor=-3.0, max_iters=3, fallback=False))


# --- a structure ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Multiple(prnn.AbstractStructure):
    """Multiples of the identity, each stored as one number."""

    def num_seeds(self, size):
        return 1

    def seeds(self, size, dtype):
        return np.ones((1, size), dtype)

    def compress(self, tangents):
        return tangents[..., 0, :1]

    def apply(self, matrix, vector):
        return matrix * vector

    def compose(self, later, earlier):
        return later * earlier

    def to_dense(self, matrix):
        eye = jnp.broadcast_to(jnp.eye(D, dtype=matrix.dtype), (*matrix.shape[:-1], D, D))
        return jnp.expand_dims(matrix, -1) * eye

    def restrict(self, source, matrix):
        return jnp.mean(source.diagonal(matrix), axis=-1, keepdims=True)


def leaky(params, h, x):
    """Its Jacobian is a multiple of the identity."""
    return params * jax.nn.sigmoid(x[0]) * h + jnp.tanh(x)


def test_a_structure():
    structure = Multiple()
    for solver in (
        prnn.Newton(chunk_size=1),
        prnn.Newton(chunk_size=8, linear_method=prnn.scans.Radix()),
        prnn.QuasiNewton(chunk_size=4),
        prnn.LevenbergMarquardt(chunk_size=5, damping=1e-6),
        prnn.AssociativeScan(),
    ):
        stats = agrees(leaky, jnp.asarray(0.9), solver=solver, adjoint=solver, structure=structure)
        assert not stats.fallback
    verification = prnn.verify(
        lambda h, x: leaky(0.9, h, x), XS, INIT, solver=prnn.Newton(), structure=structure
    )
    assert verification and verification.structure_ok


def test_a_structure_that_does_not_hold_is_found():
    verification = prnn.verify(
        lambda h, x: elman(WEIGHT, h, x), XS, INIT, solver=prnn.Newton(), structure=Multiple()
    )
    assert not verification.structure_ok


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalarNewton(prnn.solvers.AbstractIterativeSolver):
    """Newton's method with the mean of the diagonal: an own linearization by an own structure."""

    def linearization(self, structure, size):
        return prnn.solvers.Linearization.restricted(structure, Multiple())

    def default_chunk_size(self, structure, length, size):
        return 5


def test_an_iterative_solver_with_its_own_linearization():
    stats = agrees(elman, WEIGHT, solver=ScalarNewton(), adjoint=ScalarNewton())
    assert stats.iterations > 1 and stats.chunk_size == 5 and not stats.fallback


def test_a_structure_that_is_no_part_of_another():
    class Bare(Multiple):
        restrict = prnn.AbstractStructure.restrict

    with pytest.raises(ValueError, match="Cannot restrict Dense matrices"):
        Bare().restrict(prnn.Dense(), jnp.ones((D, D)))


# --- a scan -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Doubling(prnn.scans.AbstractScan):
    """Each element with the one 1, 2, 4, … before it (Hillis and Steele, 1986)."""

    calls: ClassVar[list[int]] = []

    def prefixes(self, combine, elements, *, reverse=False):
        length = len(jtu.tree_leaves(elements)[0])
        self.calls.append(length)
        if reverse:
            elements = jtu.tree_map(lambda x: x[::-1], elements)
        distance = 1
        while distance < length:
            before = jtu.tree_map(lambda x, d=distance: x[:-d], elements)
            here = jtu.tree_map(lambda x, d=distance: x[d:], elements)
            combined = jax.vmap(combine)(before, here)
            elements = jtu.tree_map(
                lambda x, new, d=distance: jnp.concatenate([x[:d], new]), elements, combined
            )
            distance *= 2
        return jtu.tree_map(lambda x: x[::-1], elements) if reverse else elements


class Clamps(prnn.AbstractAlgebra):
    def element(self, u):
        return u + 1, u - 1

    def constant(self, state):
        return state, state

    def compose(self, later, earlier):
        (r2, s2), (r1, s1) = later, earlier
        return jnp.minimum(r2, r1), jnp.maximum(jnp.minimum(r2, s1), s2)

    def apply(self, element, state):
        return jnp.maximum(jnp.minimum(element[0], state), element[1])


def clamp(params, h, x):
    return params * jnp.maximum(jnp.minimum(x + 1, h), x - 1)


@pytest.mark.parametrize(
    "solver",
    [
        prnn.Newton(chunk_size=1, linear_method=Doubling()),
        prnn.LevenbergMarquardt(chunk_size=5, linear_method=Doubling()),
        prnn.Speculative(chunk_size=5, num_candidates=3, linear_method=Doubling()),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_scan_in_a_solver(solver):
    Doubling.calls.clear()
    stats = agrees(elman, WEIGHT, solver=solver, adjoint=solver)
    assert Doubling.calls and not stats.fallback


def test_a_scan_of_an_algebra():
    Doubling.calls.clear()
    solver = prnn.AssociativeScan(linear_method=Doubling())
    agrees(clamp, jnp.asarray(1.0), solver=solver, algebra=Clamps())
    assert Doubling.calls


@pytest.mark.parametrize("length", [0, 1, 2, 9])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_in_a_linear_recurrence(length, reverse):
    matrices, offsets = normal(3, (length, D, D), scale=0.5), normal(4, (length, D))
    got, expected = (
        prnn.linear_recurrence(prnn.Dense(), matrices, offsets, reverse=reverse, method=method)
        for method in (Doubling(), prnn.scans.Sequential())
    )
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "method",
    [prnn.scans.Sequential(), prnn.scans.Associative(), prnn.scans.Radix(), Doubling()],
    ids=lambda method: type(method).__name__,
)
def test_prefixes_against_a_loop(method, length, reverse):
    """Of a product that does not commute."""
    elements = np.asarray(normal(5, (length, 2, 2)))

    def product(earlier, later):
        return later @ earlier

    expected, total = np.zeros_like(elements), np.eye(2)
    for i in reversed(range(length)) if reverse else range(length):
        expected[i] = total = elements[i] @ total
    got = method.prefixes(product, jnp.asarray(elements), reverse=reverse)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)


def test_a_scan_must_be_one(as_users_run_it):
    with pytest.raises(TypeError, match="`linear_method` must be .*forget the parentheses"):
        prnn.Newton(linear_method=Doubling)
    with pytest.raises(TypeError, match="`method` must be .*AbstractScan.*got 3"):
        prnn.linear_recurrence(prnn.Dense(), jnp.ones((2, 1, 1)), jnp.ones((2, 1)), method=3)


# --- a sweep ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OneByOne(prnn.sweeps.AbstractSweep):
    """One chunk after another, each by a scan of its own."""

    calls: ClassVar[list[int]] = []

    def run(self, step, starts, inputs, rows, *, keep):
        self.calls.append(rows.num_steps)
        index = rows.at(jnp.arange(rows.num_steps))
        ends, kept = [], []
        for c in range(rows.num_chunks):
            start, xs = jtu.tree_map(lambda s, c=c: s[c], starts), index[:, c]
            xs = jtu.tree_map(lambda x, i=xs: x[i], inputs)
            end, states = jax.lax.scan(lambda h, x: (step(h, x),) * 2, start, xs)
            ends.append(end)
            kept.append(states)
        ends = jtu.tree_map(lambda *e: jnp.stack(e), *ends)
        if not keep:
            return ends, None
        states = jtu.tree_map(lambda *s: jnp.concatenate(s)[: rows.length], *kept)
        return ends, jtu.tree_map(lambda s: s[::-1], states) if rows.reverse else states


@pytest.mark.parametrize(
    "solver",
    [
        prnn.Newton(chunk_size=8, sweep_method=OneByOne()),
        prnn.Jacobi(chunk_size=8, sweep_method=OneByOne(), overlap=3),
        prnn.Sequential(sweep_method=OneByOne()),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_sweep(solver):
    OneByOne.calls.clear()
    agrees(elman, WEIGHT, solver=solver, adjoint=prnn.adjoints.LinearSolveAdjoint(solver))
    assert OneByOne.calls


# --- an adjoint -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plain(prnn.adjoints.AbstractLinearAdjoint):
    """The tangents of the scan itself."""

    def tangents(self, recurrence, states, tangents):
        def all_states(recurrence):
            return prnn.Sequential().solve_affine(recurrence)

        return eqx.filter_jvp(all_states, (recurrence,), (tangents,))[1]


def test_an_adjoint():
    agrees(elman, WEIGHT, solver=prnn.Newton(chunk_size=5), adjoint=Plain())
    solver = {"solver": prnn.Jacobi(chunk_size=5), "adjoint": Plain()}
    tangents = [
        jax.jvp(lambda w, o=o: states_of(w, **o), (WEIGHT,), (jnp.ones_like(WEIGHT),))[1]
        for o in (solver, {"solver": prnn.Sequential()})
    ]
    np.testing.assert_allclose(*tangents, rtol=1e-9, atol=1e-10)


def states_of(weight, **options):
    return prnn.solve(lambda h, x: elman(weight, h, x), XS, INIT, **options).states


@pytest.mark.parametrize(
    "adjoint",
    [
        prnn.adjoints.OnePassAdjoint(),
        prnn.adjoints.OnePassAdjoint(block_size=1),
        prnn.adjoints.OnePassAdjoint(block_size=7),
        prnn.adjoints.OnePassAdjoint(block_size=1000),
        prnn.adjoints.LinearSolveAdjoint(),
        prnn.adjoints.LinearSolveAdjoint(prnn.Jacobi()),
    ],
    ids=repr,
)
def test_the_adjoints_by_name(adjoint):
    agrees(elman, WEIGHT, adjoint=adjoint)


# --- a rule for a primitive -------------------------------------------------------------------


def rotation():
    """A primitive that moves each element to the place after its own."""

    def rotate(x):
        return jnp.concatenate([x[-1:], x[:-1]])

    primitive = jex_core.Primitive("rotate_by_one")
    primitive.def_impl(rotate)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(rotate, multiple_results=False))
    ad.primitive_jvps[primitive] = lambda x, t: (primitive.bind(*x), primitive.bind(*t))
    batching.primitive_batchers[primitive] = lambda x, axes: (
        jnp.roll(x[0], 1, axis=1 if axes[0] == 0 else 0),
        axes[0],
    )
    return primitive


def test_a_rule_for_a_primitive():
    primitive = rotation()

    def step(h, x):  # turns, and turns back
        return jnp.tanh(0.5 * jnp.roll(primitive.bind(h), -1) + x)

    assert isinstance(prnn.detect_structure(step, INIT, XS[0]), prnn.Dense)

    def rotated(eqn, patterns):
        (pattern,) = patterns
        return [pattern[np.roll(np.arange(pattern.shape[0]), 1)]]

    prnn.jaxprs.register_rule(primitive, rotated)
    assert isinstance(prnn.detect_structure(step, INIT, XS[0]), prnn.Diagonal)
    solution = prnn.solve(step, XS, INIT, solver=prnn.Newton(chunk_size=1))
    expected = scan(lambda h, x: jnp.tanh(0.5 * h + x), XS, INIT)
    np.testing.assert_allclose(solution.states, expected, rtol=1e-11, atol=1e-12)
    assert not solution.stats.fallback
