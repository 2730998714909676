"""What a selection returns is complete: another platform's program runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn

L, D = 200, 3
XS = jax.random.normal(jax.random.key(0), (L, D))
INIT = jnp.zeros(D)
WEIGHT = 0.4 * jax.random.normal(jax.random.key(1), (D, D))
A = jnp.linspace(0.1, 0.6, D)

STEPS = {
    "dense": lambda h, x: jnp.tanh(WEIGHT @ h + x),
    "diagonal": lambda h, x: jnp.tanh(A * h + x),
    "affine": lambda h, x: A * h + x,
}


@pytest.mark.parametrize("name", STEPS)
def test_the_choice_of_a_gpu_runs_here(name):
    step = STEPS[name]
    solver, _ = prnn.select_solver(step, XS, INIT, platform="gpu")
    adjoint, reason = prnn.select_adjoint(step, XS, INIT, platform="gpu")
    assert isinstance(adjoint, prnn.adjoints.LinearSolveAdjoint) and "gpu" in reason
    for chosen in (solver, adjoint.solver):
        assert chosen.linear_method == prnn.scans.Radix()
        # Nothing is left to this platform.
        recurrence = prnn.Recurrence(step, XS, INIT)
        assert chosen.resolved(recurrence, "cpu") == chosen == chosen.resolved(recurrence, "gpu")

    def loss(xs, **options):
        return jnp.sum(jnp.sin(prnn.solve(step, xs, INIT, **options).states))

    got = jax.value_and_grad(lambda xs: loss(xs, solver=solver, adjoint=adjoint))(XS)
    expected = jax.value_and_grad(loss)(XS)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_what_an_accelerator_gets(monkeypatch):
    """Without kernels: short chunks, written out; iterations that are not asked for their success;
    and for a dense step, chunks that start early."""
    monkeypatch.setenv("PARARNN_KERNELS", "0")
    xs = jax.ShapeDtypeStruct((5000, D), float)
    common = {
        "chunk_size": 32,
        "linear_method": prnn.scans.Radix(),
        "sweep_method": prnn.sweeps.Unrolled(),
    }
    solver, reason = prnn.select_solver(STEPS["diagonal"], xs, INIT, platform="gpu")
    assert solver == prnn.Newton(**common, overlap=0, min_iters=3)
    assert "157 chunks of 32 steps" in reason
    solver, reason = prnn.select_solver(STEPS["dense"], xs, INIT, platform="gpu")
    assert solver == prnn.Newton(**common, overlap=32, min_iters=0)
    assert "32 steps early" in reason
    solver, _ = prnn.select_solver(STEPS["affine"], xs, INIT, platform="gpu")
    corrector = prnn.Newton(**common, overlap=0, min_iters=2, max_iters=10)
    assert solver == prnn.AssociativeScan(linear_method=prnn.scans.Radix(), corrector=corrector)


def test_what_was_asked_for_stays():
    recurrence = prnn.Recurrence(STEPS["dense"], XS, INIT)
    asked = prnn.Newton(
        chunk_size=16,
        linear_method=prnn.scans.Associative(),
        sweep_method=prnn.sweeps.Scanned(),
        overlap=4,
        min_iters=1,
    )
    for platform in ("cpu", "gpu"):
        assert asked.resolved(recurrence, platform) == asked
    assert prnn.Newton(chunk_size=1000, overlap=1000).resolved(recurrence, "gpu").overlap == L
    assert prnn.Picard().resolved(recurrence, "gpu").overlap == 0


def test_the_adjoint_of_a_cpu_follows_the_batch():
    one, _ = prnn.select_adjoint(STEPS["dense"], XS, INIT, platform="cpu")
    many, _ = prnn.select_adjoint(STEPS["dense"], XS, INIT, platform="cpu", batch_size=64)
    assert one.block_size > 1 and many == prnn.adjoints.OnePassAdjoint(block_size=1)
    gpu, _ = prnn.select_adjoint(STEPS["dense"], XS, INIT, platform="gpu", batch_size=64)
    assert isinstance(gpu, prnn.adjoints.LinearSolveAdjoint)


def test_the_adjoint_of_a_layer_is_its_own():
    cell = prnn.GRU(D, D, key=jax.random.key(0))
    rnn = prnn.RNN(cell, adjoint=prnn.ClippedAdjoint(1.0))
    adjoint, reason = prnn.select_adjoint(rnn, XS)
    assert adjoint == prnn.ClippedAdjoint(1.0) and "layer" in reason
    rnn = prnn.RNN(cell, adjoint=prnn.ClippedAdjoint(1.0, prnn.Jacobi()))
    adjoint, _ = prnn.select_adjoint(rnn, XS, platform="gpu")
    recurrence = prnn.Recurrence(cell.step, cell.project(XS), cell.init_state())
    assert adjoint.solver == prnn.Jacobi().resolved(recurrence, "gpu")


def test_a_step_that_cannot_be_pushed_through():
    @jax.custom_vjp
    def square(h):
        return 0.1 * h * h

    square.defvjp(lambda h: (square(h), h), lambda h, g: (0.2 * h * g,))
    adjoint, reason = prnn.select_adjoint(lambda h, x: square(h) + x, XS, INIT, platform="gpu")
    assert isinstance(adjoint, prnn.adjoints.OnePassAdjoint)
    assert "no derivative in forward mode" in reason


def test_an_algebra_beside_the_step():
    """As a structure: what a cell declares, a step function can be given."""
    clamp = prnn.ClampAlgebra()
    xs = (XS + 1, XS - 1)

    def step(h, x):
        return jnp.maximum(jnp.minimum(x[0], h), x[1])

    solver, reason = prnn.select_solver(step, xs, INIT, algebra=clamp, platform="gpu")
    assert isinstance(solver, prnn.AssociativeScan) and solver.algebra == clamp
    assert "compose exactly" in reason
    got = prnn.solve(step, xs, INIT, solver=prnn.AssociativeScan(), algebra=clamp)
    expected = prnn.solve(step, xs, INIT)
    np.testing.assert_array_equal(got.states, expected.states)
    with pytest.raises(ValueError, match="affine"):
        prnn.solve(step, xs, INIT, solver=prnn.AssociativeScan())


def test_an_algebra_must_be_one(as_users_run_it):
    with pytest.raises(TypeError, match="`algebra` must be .*forget the parentheses"):
        prnn.solve(STEPS["dense"], XS, INIT, algebra=prnn.ClampAlgebra)


@pytest.mark.parametrize("adjoint", [None, prnn.Newton(), prnn.ClippedAdjoint(5.0, prnn.Newton())])
def test_the_structure_is_found_once(adjoint, monkeypatch):
    """Per solve, whatever is made of it: forwards, in the derivative, and in its derivative."""
    calls = []

    def detect(*args):
        calls.append(args)
        return prnn.detect_structure(*args)

    monkeypatch.setattr("pararnn._recurrence.detect_structure", detect)

    def loss(xs):
        solver = prnn.Newton(chunk_size=10)
        states = prnn.solve(STEPS["dense"], xs, INIT, solver=solver, adjoint=adjoint).states
        return jnp.sum(jnp.sin(states))

    jax.jit(jax.grad(loss)).lower(XS)
    assert len(calls) == 1
