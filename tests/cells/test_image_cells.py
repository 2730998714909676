"""What is particular to cells whose states are images."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import pararnn as prnn
from pararnn.cells._conv import convolve

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
CELLS = {
    "ConvLSTM": lambda **k: prnn.ConvLSTM(2, 1, (3, 4), **k),
    "ConvS5": lambda **k: prnn.ConvS5(2, 2, (3, 4), 1, **k),
}
each_cell = pytest.mark.parametrize("name", CELLS)


def close(got, expected, tol=1e-12):
    np.testing.assert_allclose(got, expected, rtol=tol, atol=tol)


def images(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((length, 2, 3, 4)))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_convolution(kernel):
    """With filters larger than the image, too."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((5, 2, *kernel)))
    layout = ("NCHW", "OIHW", "NCHW")
    expected = jax.lax.conv_general_dilated(
        images(3), weight, (1, 1), "SAME", dimension_numbers=layout
    )
    close(convolve(weight, images(3)), expected)
    close(convolve(weight, images(3)[1]), expected[1])
    assert convolve(weight, images(0)).shape == (0, 5, 3, 4)


@each_cell
def test_promises(name):
    """Values, gradients, the structure, locality in time, and streaming."""
    cell = CELLS[name](key=KEY)
    found = prnn.verify(cell, images(12), solver=prnn.Newton(chunk_size=4))
    assert found and found.broken_promises == ()


def test_conv_s5_is_solved_in_one_pass():
    cell = prnn.ConvS5(2, 2, (3, 4), key=KEY)
    one_pass = prnn.RNN(cell, solver=prnn.AssociativeScan()).solve(images(13), throw=False)
    expected = prnn.RNN(cell, solver=prnn.Sequential()).solve(images(13), throw=False)
    close(one_pass.states, expected.states)
    many = jax.ShapeDtypeStruct((500, 2, 3, 4), float)
    solver, _ = prnn.select_solver(cell, many, platform="gpu")
    assert isinstance(solver, prnn.AssociativeScan)


@each_cell
def test_batches_of_packed_sequences(name):
    """Two sequences in one, with padding between, are as each by itself."""
    rnn = prnn.RNN(CELLS[name](key=KEY))
    batch = jnp.stack([images(12), images(12, seed=1)])
    reset = np.isin(np.arange(12), (0, 7))
    mask = ~np.isin(np.arange(12), (5, 6))

    @eqx.filter_jit
    def run(rnn, batch, **k):
        return jax.vmap(lambda xs: rnn(xs, throw=False, **k))(batch)

    ys, final = run(rnn, batch, reset=reset, mask=mask)
    first, second = run(rnn, batch[:, :5]), run(rnn, batch[:, 7:])
    padding = jnp.zeros((2, 2, 1, 3, 4))
    close(ys, jnp.concatenate([first[0], padding, second[0]], axis=1))
    jtu.tree_map(close, final, second[1])


@each_cell
def test_learning(name):
    """Derivatives through the layer are those of the scan."""
    cell = CELLS[name](key=KEY)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((9, 1, 3, 4)))

    @eqx.filter_jit
    @eqx.filter_grad
    def by_layer(arguments):
        cell, xs = arguments
        return jnp.vdot(
            weights, prnn.RNN(cell, solver=prnn.Jacobi(chunk_size=3))(xs, throw=False)[0]
        )

    @eqx.filter_jit
    @eqx.filter_grad
    def by_scan(arguments):
        cell, xs = arguments
        us = cell.project(xs)
        step = lambda h, u: (cell.step(h, u),) * 2  # noqa: E731
        return jnp.vdot(weights, cell.readout(jax.lax.scan(step, cell.init_state(), us)[1], us))

    arguments = (cell, images(9))
    jtu.tree_map(
        lambda a, b: close(a, b, 1e-10),
        *(eqx.filter(run(arguments), eqx.is_array) for run in (by_layer, by_scan)),
    )


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("cls", [prnn.ConvLSTM, prnn.ConvS5])
def test_arguments(cls):
    for sizes, message in (
        ((0, 2, (3, 4)), "`input_channels` must be at least 1; got 0"),
        ((2, 0, (3, 4)), "`hidden_channels` must be at least 1"),
        ((2, 2, (3, 0)), "`width` must be at least 1"),
        ((2, 2, (3, 4, 5)), r"`image_shape` must be \(height, width\); got \(3, 4, 5\)"),
        ((2, 2, 3), r"`image_shape` must be \(height, width\); got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(*sizes, key=KEY)
    with pytest.raises(ValueError, match="`kernel_size` must be at least 1"):
        cls(2, 2, (3, 4), kernel_size=0, key=KEY)
    cell = cls(2, 2, (3, 4), key=KEY)
    for shape, message in (
        ((5, 3, 4, 2), r"got \(5, 3, 4, 2\). Channels come first: `jnp.moveaxis\(xs, -1, 1\)`"),
        ((7, 5, 2, 3, 4), "For a batch of sequences use `jax.vmap`"),
        ((5, 24), r"= \(L, 2, 3, 4\); got \(5, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prnn.RNN(cell)(jnp.zeros(shape))
