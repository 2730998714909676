"""Steps that cannot be differentiated in every way: what needs no derivative works, what needs one
says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import error, normal, scan

import pararnn as prnn

LENGTH, SIZE = 70, 2
ARGS = normal(0, (SIZE, SIZE), scale=0.4), normal(1, (LENGTH, SIZE)), normal(2, (SIZE,))


@jax.custom_vjp
def _sine(x):
    """With a rule that is not its derivative, so that it is seen which one was used."""
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (0.9 * g * jnp.cos(x),))


def pulled_only(w, h, x):
    """A derivative in reverse mode only."""
    return _sine(w @ h + x)


def input_pulled_only(w, h, x):
    """Not of the inputs, but of the state."""
    return jnp.tanh(w @ h + _sine(x))


def called_back(w, h, x):
    """No derivative at all."""
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return jax.pure_callback(np.tanh, shape, w @ h + x, vmap_method="expand_dims")


def looped(w, h, x):
    """A derivative in forward mode only: the root of y + tanh(y) / 3 = w h + x, by a loop."""
    target = w @ h + x

    def improve(carry):
        y, _ = carry
        better = y - (y + jnp.tanh(y) / 3 - target) / (1 + (1 - jnp.tanh(y) ** 2) / 3)
        return better, jnp.max(jnp.abs(better - y))

    return jax.lax.while_loop(lambda c: c[1] > 1e-12, improve, (target, jnp.asarray(1.0)))[0]


def states(step, **options):
    def run(w, xs, init):
        return prnn.solve(functools.partial(step, w), xs, init, **options).states

    return run


def scanned(step):
    return lambda w, xs, init: scan(functools.partial(step, w), xs, init)


def gradient(run):
    def loss(*args):
        out = run(*args)
        return jnp.sum(jnp.cos(jnp.arange(float(out.size))).reshape(out.shape) * jnp.sin(out))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*ARGS)


WITHOUT = {
    "default": None,
    "Sequential": prnn.Sequential(),
    "Jacobi": prnn.Jacobi(chunk_size=8),
    "Picard": prnn.Picard(),
    "Speculative": prnn.Speculative(chunk_size=8, num_candidates=2, corrector=prnn.Jacobi()),
}
WITH = {
    "Newton": prnn.Newton(),
    "QuasiNewton": prnn.QuasiNewton(),
    "LevenbergMarquardt": prnn.LevenbergMarquardt(),
    "Speculative": prnn.Speculative(),
    "AssociativeScan": prnn.AssociativeScan(),
}


@pytest.mark.parametrize("step", [pulled_only, called_back])
@pytest.mark.parametrize("name", WITHOUT)
def test_methods_that_need_no_derivative(name, step):
    got = prnn.solve(functools.partial(step, ARGS[0]), *ARGS[1:], solver=WITHOUT[name])
    assert error(got.states, scanned(step)(*ARGS)) <= 1e-10


@pytest.mark.parametrize("step", [pulled_only, called_back])
@pytest.mark.parametrize("structure", [None, prnn.Dense()], ids=["detected", "declared"])
@pytest.mark.parametrize("name", WITH)
def test_methods_that_need_one_say_so(name, structure, step):
    with pytest.raises(ValueError, match=rf"`solver={name}\(…\)` pushes.*Use Jacobi\(\)"):
        states(step, solver=WITH[name], structure=structure)(*ARGS)


@pytest.mark.parametrize("step", [pulled_only, called_back])
def test_choosing_for_such_a_step(step):
    bound = functools.partial(step, ARGS[0])
    solver, reason = prnn.select_solver(bound, *ARGS[1:], platform="gpu")
    assert isinstance(solver, prnn.Sequential) and "no derivative in forward mode" in reason
    assert prnn.detect_structure(bound, ARGS[2], ARGS[1][0]) == prnn.Dense()


def test_a_method_without_derivatives_where_nothing_is_forgotten():
    """The bound on what defects may add up to cannot ask what becomes of them."""

    def step(_, h, x):
        return h + 1e-3 * _sine(x)

    solution = prnn.solve(
        functools.partial(step, None), *ARGS[1:], solver=prnn.Jacobi(chunk_size=4)
    )
    assert error(solution.states, scanned(step)(*ARGS)) <= 1e-10


ADJOINTS = {
    "default": None,
    "Sequential": prnn.Sequential(),
    "Newton": prnn.Newton(chunk_size=4),
    "Jacobi": prnn.Jacobi(chunk_size=8),
    "AssociativeScan": prnn.AssociativeScan(),
    "clipped": prnn.ClippedAdjoint(1e9),
}


@pytest.mark.parametrize(
    "step, solver, adjoint",
    [
        *((pulled_only, "Jacobi", adjoint) for adjoint in ADJOINTS),
        (pulled_only, "Sequential", "Newton"),
        (pulled_only, "default", "default"),
        (input_pulled_only, "Newton", "Newton"),
    ],
)
def test_what_is_pulled_only(step, solver, adjoint):
    """Gradients with every adjoint, by the rule of the `custom_vjp`."""
    run = states(step, solver={**WITH, **WITHOUT}[solver], adjoint=ADJOINTS[adjoint])
    assert error(gradient(run), gradient(scanned(step))) <= 1e-9


def test_on_a_platform_with_another_default(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert error(gradient(states(pulled_only)), gradient(scanned(pulled_only))) <= 1e-9


def test_errors_of_jax():
    """In a mode that the step does not have."""
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(states(pulled_only, solver=prnn.Jacobi()), ARGS, ARGS)
    with pytest.raises(ValueError, match="callbacks do not support JVP"):
        gradient(states(called_back, solver=prnn.Jacobi()))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        gradient(states(looped))
    message = "`step` cannot be differentiated in reverse mode.*Reverse-mode.*while_loop.*jax.jvp"
    for adjoint in (prnn.Newton(), prnn.Jacobi()):
        with pytest.raises(RuntimeError, match=message):
            gradient(states(looped, adjoint=adjoint))
    batched = jax.vmap(states(looped, adjoint=prnn.Newton()), in_axes=(None, 0, None))
    with pytest.raises(RuntimeError, match=message):
        jax.grad(lambda xs: jnp.sum(batched(ARGS[0], xs, ARGS[2])))(jnp.stack([ARGS[1]] * 2))


def test_a_state_that_cannot_be_pulled_back_beside_inputs_that_can():
    """What flows back to the inputs would be wrong, not an error."""

    def step(h, x):
        return jax.lax.while_loop(lambda h: jnp.max(h) > 1, lambda h: h / 2, h) + x

    def loss(xs):
        return jnp.sum(prnn.solve(step, xs, jnp.ones(2), adjoint=prnn.Newton()).states)

    with pytest.raises(RuntimeError, match="`step` cannot be differentiated in reverse mode"):
        jax.grad(loss)(ARGS[1])
    by_columns = jax.jacfwd(loss)(ARGS[1])  # tangents can be pushed, a batch of them too
    expected = jax.jacfwd(lambda xs: jnp.sum(scan(step, xs, jnp.ones(2))))(ARGS[1])
    np.testing.assert_allclose(by_columns, expected, rtol=1e-12)


@functools.cache
def pushed(run):
    """The states, and first and second derivatives along a direction."""

    def first(scale):
        w, xs, init = ARGS
        return jax.jvp(run, (w, scale * xs, init), ARGS)

    return jax.jit(lambda: jax.jvp(first, (1.0,), (1.0,)))()


EXPECTED = scanned(looped)


@pytest.mark.parametrize(
    "solver, adjoint",
    [
        ("Newton", "default"),
        ("Sequential", "Newton"),
        ("Jacobi", "Jacobi"),
        ("Sequential", "AssociativeScan"),
    ],
)
def test_what_is_pushed_only(solver, adjoint):
    """Forward mode with every adjoint that has it."""
    run = states(looped, solver={**WITH, **WITHOUT}[solver], adjoint=ADJOINTS[adjoint])
    assert error(pushed(run), pushed(EXPECTED)) <= 1e-9
