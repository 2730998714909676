"""Programs that are exported for sequences of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal, scan

import pararnn as prnn

# A symbolic length is no `int`, as which the package declares lengths.
pytestmark = pytest.mark.usefixtures("as_users_run_it")

T, B = jax.export.symbolic_shape("t, b")
XS, INIT = normal(0, (7, 3)), jnp.zeros(3)
GRU = prnn.GRU(3, 4, key=jax.random.key(0))


def step(h, x):
    return 0.5 * jnp.tanh(h) + x


def exported(function, shape=(T, 3)):
    xs = jax.ShapeDtypeStruct(shape, XS.dtype)
    return jax.export.export(jax.jit(function))(xs)


@pytest.mark.parametrize("solver", [None, prnn.Sequential()])
@pytest.mark.parametrize("adjoint", [None, prnn.Newton()])
def test_states_of_any_length(solver, adjoint):
    def states(xs):
        return prnn.solve(step, xs, INIT, solver=solver, adjoint=adjoint, throw=False).states

    program = exported(states)
    for length in (1, 7):
        np.testing.assert_array_equal(program.call(XS[:length]), scan(step, XS[:length], INIT))


def test_stats_of_any_length():
    program = exported(lambda xs: jax.tree.leaves(prnn.solve(step, xs, INIT, throw=False).stats))
    expected = jax.tree.leaves(prnn.solve(step, XS, INIT).stats)
    assert list(map(float, program.call(XS))) == list(map(float, expected))


def test_derivatives_of_any_length():
    def gradient(adjoint, run=prnn.solve):
        def loss(xs):
            if run is scan:
                return jnp.sum(scan(step, xs, INIT) ** 2)
            return jnp.sum(run(step, xs, INIT, adjoint=adjoint, throw=False).states ** 2)

        return jax.grad(loss)

    expected = gradient(None, scan)(XS)
    for adjoint in (None, prnn.Sequential(), prnn.ClippedAdjoint(1e9)):
        np.testing.assert_allclose(exported(gradient(adjoint)).call(XS), expected, rtol=1e-12)
    for adjoint in (prnn.Newton(), prnn.ClippedAdjoint(1e9, prnn.Newton(chunk_size=4))):
        with pytest.raises(ValueError, match="symbolic length t.*`Newton.*`adjoint=pararnn.Seq"):
            exported(gradient(adjoint))


def test_batches_masks_and_layers_of_any_length():
    def final(xs):
        mask = jnp.arange(xs.shape[0]) != 2
        reset = jnp.arange(xs.shape[0]) == 1
        options = {"mask": mask, "reset": reset, "throw": False}
        return prnn.solve(step, xs, INIT, **options).final

    batch = jnp.stack([XS, 2 * XS])
    program = exported(jax.vmap(final), (B, T, 3))
    np.testing.assert_array_equal(program.call(batch), jax.vmap(final)(batch))
    matrices = prnn.DeltaNet(3, 2, 3, 5, key=jax.random.key(0))  # goes through chunks, otherwise
    for rnn in (prnn.RNN(GRU), prnn.RNN(GRU, segment_size=2), prnn.RNN(matrices)):
        ys = exported(lambda xs, rnn=rnn: rnn(xs, throw=False)[0]).call(XS)
        np.testing.assert_allclose(ys, rnn(XS)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "solver", [prnn.Newton(chunk_size=4), prnn.Jacobi(), prnn.AssociativeScan()]
)
def test_solvers_that_must_know_the_length(solver):
    message = (
        f"symbolic length t.*`solver={type(solver).__name__}.*number must be known.*Sequential"
    )
    with pytest.raises(ValueError, match=message):
        exported(lambda xs: prnn.solve(step, xs, INIT, solver=solver, throw=False).states)


def test_the_choice_for_any_length():
    xs = jax.ShapeDtypeStruct((T, 3), XS.dtype)
    for platform in ("cpu", "cuda"):
        solver, reason = prnn.select_solver(step, xs, INIT, platform=platform)
        assert solver == prnn.Sequential() and "symbolic" in reason
        assert prnn.select_adjoint(step, xs, INIT, platform=platform)[0].stepwise
