"""Derivatives through `solve` against those through the plain scan, and against differences."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from systems import PROBLEMS, error, normal, scan

import pararnn as prnn

TOLERANCE = 1e-8
LENGTH = 12
# Solver and adjoint. The derivative is the same, whatever solves for it.
METHODS: dict[str, tuple[prnn.AbstractSolver, prnn.AbstractSolver | None]] = {
    "Sequential, default": (prnn.Sequential(), None),
    "Newton, default": (prnn.Newton(), None),
    "Newton 1, Newton 1": (prnn.Newton(chunk_size=1), prnn.Newton(chunk_size=1)),
    "Newton 4, Newton 4 associative": (
        prnn.Newton(chunk_size=4),
        prnn.Newton(chunk_size=4, linear_method=prnn.scans.Associative()),
    ),
    "Sequential, Newton 1 radix": (
        prnn.Sequential(),
        prnn.Newton(chunk_size=1, linear_method=prnn.scans.Radix()),
    ),
    "Jacobi 3, Jacobi 3": (prnn.Jacobi(chunk_size=3), prnn.Jacobi(chunk_size=3)),
    "QuasiNewton 3, Sequential": (prnn.QuasiNewton(chunk_size=3), prnn.Sequential()),
    "Picard, QuasiNewton 4": (prnn.Picard(), prnn.QuasiNewton(chunk_size=4)),
    "ElementwiseNewton 3, ElementwiseNewton 4": (
        prnn.ElementwiseNewton(chunk_size=3),
        prnn.ElementwiseNewton(chunk_size=4),
    ),
    "Newton 5, LevenbergMarquardt": (prnn.Newton(chunk_size=5), prnn.LevenbergMarquardt()),
    "Speculative, AssociativeScan": (
        prnn.Speculative(chunk_size=3, num_candidates=2),
        prnn.AssociativeScan(),
    ),
}


def over_methods(*names):
    chosen = names or METHODS
    return pytest.mark.parametrize("method", [METHODS[n] for n in chosen], ids=chosen)


def solved(problem, method, throw=False):
    """`(params, xs, init) -> states` by a method. A program that raises is compiled in each run of
    the tests, so only some do; the states themselves tell of a failure."""
    solver, adjoint = method

    def run(params, xs, init):
        step = functools.partial(problem.step, params)
        return prnn.solve(step, xs, init, solver=solver, adjoint=adjoint, throw=throw).states

    return run


def scanned(problem):
    return lambda params, xs, init: scan(functools.partial(problem.step, params), xs, init)


def loss_of(run):
    """A real number that every state enters differently."""

    def loss(*args):
        total = 0.0
        for leaf in jtu.tree_leaves(run(*args)):
            for part in (jnp.real(leaf), jnp.imag(leaf)) if jnp.iscomplexobj(leaf) else (leaf,):
                weights = jnp.cos(jnp.arange(part.size, dtype=part.dtype)).reshape(part.shape)
                total = total + jnp.sum(weights * jnp.sin(2 * part))
        return total

    return loss


def direction(seed, tree):
    leaves, treedef = jtu.tree_flatten(tree)
    made = []
    for i, leaf in enumerate(leaves):
        real = normal(seed + i, leaf.shape)
        complex_ = jnp.iscomplexobj(leaf)
        made.append(jax.lax.complex(real, normal(seed + 50 + i, leaf.shape)) if complex_ else real)
    return jtu.tree_unflatten(treedef, made)


@functools.cache
def gradients(name):
    """The problem, its arguments, and value and gradient by differentiating the scan."""
    problem = PROBLEMS[name]
    args = problem.make(LENGTH, np.float64)
    loss = loss_of(scanned(problem))
    return problem, args, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)


@over_methods()
def test_gradient(method):
    """With respect to parameters, inputs and the initial state."""
    problem, args, expected = gradients("LSTM")
    loss = loss_of(solved(problem, method, throw=isinstance(method[0], prnn.Newton)))
    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)
    assert error(got, expected) <= TOLERANCE


@over_methods("Newton 4, Newton 4 associative", "Jacobi 3, Jacobi 3")
@pytest.mark.parametrize("name", ["diagonal GRU", "dense GRU", "complex", "matrix"])
def test_gradient_of_other_states(name, method):
    problem, args, expected = gradients(name)
    loss = loss_of(solved(problem, method))
    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)
    assert error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 48, 67])
def test_one_pass_in_blocks(length):
    """One step, whole blocks, blocks and a rest: both modes, and one over the other."""
    problem = PROBLEMS["LSTM"]
    args = problem.make(length, np.float64)
    v = direction(7, args)

    def results(run):
        gradient = jax.grad(loss_of(run), argnums=(0, 1, 2))
        return jax.jvp(run, args, v)[1], jax.jvp(gradient, args, v)

    method = prnn.Sequential(), prnn.Sequential()
    got, expected = (
        jax.jit(functools.partial(results, run))()
        for run in (solved(problem, method), scanned(problem))
    )
    assert error(got, expected) <= TOLERANCE


def modes(run, args, tangents, others):
    """Every mode that JAX has, of the states and of a loss, by one function."""
    loss = loss_of(run)
    grad = jax.grad(loss, argnums=(0, 1, 2))

    def along(f):
        return lambda *a: jax.jvp(f, a, tangents)[1]

    states, pushforward = jax.linearize(run, *args)
    _, pullback = jax.vjp(run, *args)
    return {
        "jvp": along(run)(*args),
        "jvp of jvp": along(along(run))(*args),
        "grad of jvp": jax.grad(along(loss), argnums=(0, 1, 2))(*args),
        "grad of grad": jax.grad(
            lambda *a: sum(
                jnp.vdot(x, y)
                for x, y in zip(jtu.tree_leaves(grad(*a)), jtu.tree_leaves(others), strict=True)
            ),
            argnums=(0, 1, 2),
        )(*args),
        "linearize": pushforward(*others),
        "vmap of vjp": jax.vmap(pullback)(
            jtu.tree_map(lambda s: jnp.stack([s, jnp.cos(s)]), states)
        ),
        "vmap of grad": jax.vmap(grad, in_axes=(None, 0, None))(
            args[0], jtu.tree_map(lambda x: jnp.stack([x, -x]), args[1]), args[2]
        ),
        "hessian": jax.hessian(lambda h: loss(args[0], args[1], h))(args[2]),
        "checkpoint": jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))(*args),
    }


@functools.cache
def expected_modes(name):
    problem = PROBLEMS[name]
    args = problem.make(5, np.float64)
    tangents, others = direction(100, args), direction(200, args)
    run = jax.jit(lambda *a: modes(scanned(problem), *a))
    return (args, tangents, others), run(args, tangents, others)


@pytest.mark.parametrize(
    "name, method",
    [
        ("diagonal GRU", "Newton 1, Newton 1"),
        ("dense GRU", "Newton, default"),
        ("LSTM", "Newton 4, Newton 4 associative"),
    ],
)
def test_every_mode(name, method):
    problem, method = PROBLEMS[name], METHODS[method]
    inputs, expected = expected_modes(name)
    run = solved(problem, method, throw=name == "diagonal GRU")
    got = jax.jit(lambda *a: modes(run, *a))(*inputs)
    worst = {mode: error(got[mode], expected[mode]) for mode in expected}
    assert max(worst.values()) <= TOLERANCE, worst


@over_methods("Newton 4, Newton 4 associative", "Jacobi 3, Jacobi 3")
def test_finite_differences(method):
    """First and second derivatives along a direction, by central differences."""
    problem = PROBLEMS["dense GRU"]
    args = problem.make(LENGTH, np.float64)
    v = direction(7, args)
    run = jax.jit(jax.value_and_grad(loss_of(solved(problem, method)), argnums=(0, 1, 2)))

    def dot(a, b):
        return sum(
            float(jnp.vdot(x, y))
            for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
        )

    def at(step):
        return run(*jtu.tree_map(lambda a, d: a + step * d, args, v))

    eps = 1e-4
    (ahead, grad_ahead), (behind, grad_behind) = at(eps), at(-eps)
    value, grad = at(0.0)
    np.testing.assert_allclose((ahead - behind) / (2 * eps), dot(grad, v), rtol=1e-6)
    second = (ahead - 2 * value + behind) / eps**2
    curvature = (dot(grad_ahead, v) - dot(grad_behind, v)) / (2 * eps)
    np.testing.assert_allclose(second, curvature, rtol=1e-4)
    hessian = jax.jvp(jax.grad(loss_of(solved(problem, method)), argnums=(0, 1, 2)), args, v)[1]
    np.testing.assert_allclose(curvature, dot(hessian, v), rtol=1e-6)


def test_jit_of_vmap_of_hessian():
    def loss(run, weights, xs):
        return jnp.sum(run(lambda h, x: jnp.tanh(weights * h + x), xs, jnp.zeros(2)) ** 2)

    def solution(step, xs, init):
        return prnn.solve(step, xs, init, solver=prnn.Newton(), adjoint=prnn.Newton()).states

    batch = normal(0, (3, 10, 2))
    got, expected = (
        jax.jit(jax.vmap(jax.hessian(functools.partial(loss, run)), in_axes=(None, 0)))(
            jnp.asarray([0.5, -0.8]), batch
        )
        for run in (solution, scan)
    )
    assert got.shape == (3, 2, 2)
    assert error(got, expected) <= TOLERANCE


def test_closed_over_tracers():
    """What a step closes over is differentiated, in nested functions, modules and all modes."""
    xs = normal(0, (LENGTH, 3))

    def loss(run, theta):
        scale = jnp.exp(theta["log"])  # an intermediate value, not an argument

        def outer(shift):
            def step(h, x):
                return jnp.tanh(scale * h + theta["matrix"] @ x + shift)

            return jnp.sum(jnp.sin(run(step, xs, theta["init"])))

        value, slope = jax.value_and_grad(outer)(theta["shift"])
        return value + slope

    theta = {
        "log": normal(1, (3,)),
        "matrix": normal(2, (3, 3)),
        "init": normal(3, (3,)),
        "shift": jnp.asarray(0.1),
    }

    def with_solver(method):
        def run(step, xs, init):
            return prnn.solve(
                step, xs, init, solver=method[0], adjoint=method[1], throw=False
            ).states

        return jax.grad(functools.partial(loss, run))

    expected = jax.jit(jax.grad(functools.partial(loss, scan)))(theta)
    for name in ("Newton 1, Newton 1", "Jacobi 3, Jacobi 3"):
        assert error(jax.jit(with_solver(METHODS[name]))(theta), expected) <= TOLERANCE
    # Without an outer jit, tracers of `grad` itself are closed over.
    assert error(with_solver(METHODS["Newton 1, Newton 1"])(theta), expected) <= TOLERANCE


@over_methods("Newton 1, Newton 1", "Newton 5, LevenbergMarquardt", "Jacobi 3, Jacobi 3")
def test_through_the_final_state_only(method):
    problem = PROBLEMS["LSTM"]
    args = problem.make(LENGTH, np.float64)

    def final(params, xs, init):
        step = functools.partial(problem.step, params)
        return prnn.solve(step, xs, init, solver=method[0], adjoint=method[1]).final

    def last(*args):
        return jtu.tree_map(lambda h: h[-1], scanned(problem)(*args))

    got, expected = (
        jax.jit(jax.grad(loss_of(run), argnums=(0, 1, 2)))(*args) for run in (final, last)
    )
    assert error(got, expected) <= TOLERANCE


def test_guess_has_no_gradient():
    """Not even a far one that the iteration starts from, in both modes."""
    problem = PROBLEMS["Elman"]
    params, xs, init = problem.make(LENGTH, np.float64)
    step = functools.partial(problem.step, params)
    guess = normal(5, (LENGTH, 3))

    @jax.jit
    def both(guess):
        def run(xs, guess):
            return prnn.solve(step, xs, init, solver=prnn.Newton(chunk_size=2), guess=guess).states

        pushed = jax.jvp(lambda g: run(xs, g), (guess,), (jnp.ones_like(guess),))[1]
        pulled = jax.grad(lambda g, x: jnp.sum(run(x, g) ** 2), argnums=(0, 1))(guess, xs)
        return pushed, pulled

    pushed, (pulled, by_inputs) = both(guess)
    assert np.all(pushed == 0) and np.all(pulled == 0)
    expected = jax.grad(lambda x: jnp.sum(scan(step, x, init) ** 2))(xs)
    assert error(by_inputs, expected) <= TOLERANCE


def test_inputs_that_have_no_derivative():
    """Token ids, flags and random keys among the inputs; gradients flow to what they look up."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, LENGTH))
    xs = {"token": tokens, "key": jax.random.split(jax.random.key(0), LENGTH)}

    def loss(run, table, init):
        def step(h, x):
            noise = jax.random.normal(x["key"], h.shape)
            return jnp.tanh(0.5 * h[::-1] + table[x["token"]] + 0.1 * noise)

        return jnp.sum(jnp.sin(run(step, xs, init)))

    args = normal(1, (5, 3)), normal(2, (3,))
    expected = jax.jit(jax.grad(functools.partial(loss, scan), argnums=(0, 1)))(*args)
    for solver in (prnn.Newton(chunk_size=1), prnn.Jacobi(chunk_size=4), prnn.Sequential()):

        def run(step, xs, init, solver=solver):
            return prnn.solve(step, xs, init, solver=solver, adjoint=solver, throw=False).states

        got = jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(*args)
        assert error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("adjoint", [prnn.Newton(chunk_size=4), prnn.ElementwiseNewton()])
def test_step_that_branches(adjoint):
    """Over all steps at once, a branch is a selection, and its derivative must remain linear."""

    def loss(run, xs, init):
        def step(h, x):
            up, down = (lambda h: 0.9 * h + x), (lambda h: 0.5 * h * jnp.tanh(x - h))
            return jax.lax.cond(x[0] > 0, up, down, h)

        return jnp.sum(jnp.sin(run(step, xs, init)))

    def solution(step, xs, init):
        return prnn.solve(step, xs, init, adjoint=adjoint, throw=False).states

    args = normal(0, (LENGTH, 3)), normal(1, (3,))
    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(*args)
        for run in (solution, scan)
    )
    assert error(got, expected) <= TOLERANCE


def test_custom_derivative_of_the_step():
    """Rules for derivatives inside the step count, in the derivative as in the iteration."""

    @jax.custom_jvp
    def straight_through(h):
        return jnp.round(4 * h) / 4

    straight_through.defjvps(lambda t, ans, h: 0.9 * t)

    def loss(run, weights, xs):
        def step(h, x):
            return 0.5 * straight_through(h) + weights @ jnp.tanh(jax.lax.stop_gradient(h) + x)

        return jnp.sum(jnp.sin(run(step, xs, jnp.zeros(3))))

    args = normal(0, (3, 3), scale=0.3), normal(1, (LENGTH, 3))

    def solution(step, xs, init):
        return prnn.solve(step, xs, init, solver=prnn.Newton(chunk_size=2)).states

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(*args)
        for run in (solution, scan)
    )
    assert error(got, expected) <= TOLERANCE


# --- hostile adjoints -----------------------------------------------------------------------------


def linear_gradient(solve, matrix, cotangents):
    """The gradient with respect to the inputs of `sum(cotangents * states)`."""

    def loss(xs):
        return jnp.sum(cotangents * solve(lambda h, x: matrix @ h + x, xs))

    return jax.jit(jax.grad(loss))(jnp.zeros_like(cotangents))


def check_linear_adjoint(matrix, cotangents, adjoint):
    __tracebackhide__ = True
    init = jnp.zeros_like(cotangents[0])
    got = linear_gradient(
        lambda step, xs: prnn.solve(step, xs, init, adjoint=adjoint).states, matrix, cotangents
    )
    expected = linear_gradient(lambda step, xs: scan(step, xs, init), matrix, cotangents)
    assert error(got, expected) <= {4: 1e-5, 8: 1e-10}[got.dtype.itemsize]


ADJOINTS = {
    "Newton 1": prnn.Newton(chunk_size=1),
    "Newton 1 associative": prnn.Newton(chunk_size=1, linear_method=prnn.scans.Associative()),
    "Newton 64": prnn.Newton(chunk_size=64),
    "Newton 16 associative": prnn.Newton(chunk_size=16, linear_method=prnn.scans.Associative()),
    "Jacobi 1": prnn.Jacobi(chunk_size=1),
    "Jacobi 16": prnn.Jacobi(chunk_size=16),
    "one iteration": prnn.Jacobi(chunk_size=8, max_iters=1),
    "one iteration, no finish": prnn.QuasiNewton(chunk_size=8, max_iters=1, fallback=False),
}
over_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS.keys())


@over_adjoints
def test_adjoint_whose_jacobians_overflow(adjoint):
    """A direction that nothing excites, but in which every product of Jacobians is infinite."""
    matrix = jnp.diag(jnp.asarray([0.999, 1e20]))
    cotangents = normal(0, (300, 2)).at[:, 1].set(0)
    check_linear_adjoint(matrix, cotangents, adjoint)


@over_adjoints
def test_adjoint_that_never_forgets(adjoint):
    """A derivative has no place to report a failure: it must be right. A slow mode beside a fast
    one, an integrator with tiny cotangents, a rotation."""
    modes = np.diag([0.1, 0.9995, 1.0, 0.0, 0.0])
    modes[3:, 3:] = [[0, -1], [1, 0]]
    scale = jnp.asarray([1.0, 3e-8, 3e-8, 1e-7, 0.0], jnp.float32)
    steady = jnp.broadcast_to(scale, (4000, 5))
    check_linear_adjoint(jnp.asarray(modes, jnp.float32), steady, adjoint)


@over_methods(
    "Newton 4, Newton 4 associative", "Jacobi 3, Jacobi 3", "Speculative, AssociativeScan"
)
def test_gradient_of_a_chaotic_system(method):
    """Gradients grow over time; relative to their size they are still those of the scan."""
    weights = normal(0, (4, 4), scale=1.5)
    xs, init = normal(1, (40, 4), scale=0.3), normal(2, (4,))

    def final(run, weights, xs, init):
        states = run(lambda h, x: jnp.tanh(weights @ h + x), xs, init)
        return jnp.sum(states[-1])

    def solution(step, xs, init):
        return prnn.solve(step, xs, init, solver=prnn.Sequential(), adjoint=method[1]).states

    got, expected = (
        jax.jit(jax.grad(functools.partial(final, run), argnums=(0, 1, 2)))(weights, xs, init)
        for run in (solution, scan)
    )
    assert error(got, expected) <= TOLERANCE


# --- memory ---------------------------------------------------------------------------------------


def large_problem(solver, adjoint, length=512, size=32):
    """A loss of the parameters and inputs of a dense cell, and its arguments, in float32."""
    problem = PROBLEMS["dense GRU"]
    params = tuple(normal(i, (size, size), np.float32, 0.5 / size**0.5) for i in range(3))
    xs = tuple(normal(10 + i, (length, size), np.float32) for i in range(3))
    init = jnp.zeros(size, jnp.float32)

    def states(params, xs):
        return solved(problem, (solver, adjoint))(params, xs, init)

    return states, (params, xs)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "solver",
    [prnn.Jacobi(), prnn.Newton(), prnn.QuasiNewton(chunk_size=16)],
    ids=["Jacobi", "Newton", "QuasiNewton"],
)
def test_no_matrix_per_step(solver):
    """What the compiled gradient allocates is less than one Jacobian for each step."""
    length, size = 512, 32
    states, args = large_problem(solver, solver, length, size)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(states(*a))), argnums=(0, 1)))
    compiled = gradient.lower(*args).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < needed < length * size * size * 4


@pytest.mark.usefixtures("optimised")
def test_one_pass_takes_less_memory_than_the_scan():
    states, args = large_problem(prnn.Sequential(), prnn.Sequential())

    def by_scan(params, xs):
        init = jnp.zeros(params[0].shape[0], jnp.float32)
        return scanned(PROBLEMS["dense GRU"])(params, xs, init)

    ours, theirs = (
        jax.jit(jax.grad(lambda *a, run=run: jnp.sum(jnp.sin(run(*a))), argnums=(0, 1)))
        .lower(*args)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for run in (states, by_scan)
    )
    assert 0 < ours < 0.5 * theirs


@pytest.mark.parametrize(
    "solver, adjoint",
    [
        (prnn.Jacobi(), prnn.Jacobi()),
        (prnn.Newton(), prnn.Newton()),
        (prnn.Newton(), prnn.Sequential()),
    ],
    ids=["Jacobi", "Newton", "one pass"],
)
def test_what_is_kept_is_states_and_inputs(solver, adjoint):
    """Between the forward and the backward pass, and for a linearization."""
    length, size = 512, 32
    states, args = large_problem(solver, adjoint, length, size)
    _, pullback = jax.vjp(states, *args)
    _, pushforward = jax.linearize(states, *args)
    given = sum(x.size for x in jtu.tree_leaves(args))
    for kept in (pullback, pushforward):
        leaves = [x for x in jtu.tree_leaves(kept) if hasattr(x, "size")]
        assert leaves, "the closure does not show what it keeps"
        # The arguments themselves, the states, and the states once more, shifted by one step.
        assert sum(x.size for x in leaves) <= given + 4 * length * size
        assert max(x.size for x in leaves) <= length * size
