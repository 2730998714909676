"""Layers where time lies on several devices, against one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from time_mesh import LENGTH, MASK, RESET, SIZE, XS, close, mesh_of

import pararnn as prnn


def test_layers_need_no_solver_either():
    rnn = layers(None)["algebra"]
    expected = rnn(XS)
    for kind in ("Auto", "Explicit"):
        ys, final = rnn(jax.device_put(XS, NamedSharding(mesh_of(8, kind), P("time"))))
        close((ys, final), expected)
        assert ys.sharding.spec[0] == "time"


def test_both_directions():
    key = jax.random.key(0)
    cells = prnn.GRU(SIZE, SIZE, key=key), prnn.DiagonalGRU(SIZE, SIZE, key=key)

    @eqx.filter_jit
    def run(layer, xs, **options):
        def loss(layer, xs):
            ys, finals = layer(xs, **options)
            return jnp.sum(ys**2), (ys, finals)

        return eqx.filter_value_and_grad(loss, has_aux=True)(layer, xs)

    flags = {"reset": RESET[:LENGTH], "mask": MASK[:LENGTH]}
    for length, kind, options in ((24, "Explicit", {}), (LENGTH, "Auto", flags)):
        expected = run(prnn.Bidirectional(*map(prnn.RNN, cells)), XS[:length], **options)
        with jax.set_mesh(mesh_of(8, kind)):
            rnns = (prnn.RNN(cell, solver=prnn.TimeSharded("time")) for cell in cells)
            layer = prnn.Bidirectional(*rnns)
            got = run(layer, XS[:length], **options)
        got, wanted = (eqx.filter(x, eqx.is_array) for x in (got, expected))
        close(jax.tree.leaves(got), jax.tree.leaves(wanted))


def layers(solver):
    key = jax.random.key(0)
    mlp = prnn.ResidualBlock(
        SIZE, prnn.RNN(prnn.DiagonalGRU(SIZE, SIZE, key=key), solver=solver), key=key
    )
    return {
        "gru": prnn.RNN(prnn.GRU(SIZE, SIZE, key=key), solver=solver),
        "convolution": prnn.RNN(prnn.M2RNN(SIZE, 2, 3, 2, key=key), solver=solver),
        # Its first step is unlike the others.
        "starts": prnn.RNN(prnn.RGLRU(SIZE, key=key), solver=solver),
        "affine": prnn.RNN(prnn.LRU(SIZE, SIZE, key=key), solver=solver),
        "algebra": prnn.RNN(prnn.MinMax(SIZE, SIZE, key=key), solver=solver, learn_init=True),
        "stack": prnn.Stack([mlp, prnn.minmax_block(SIZE, SIZE, solver=solver, key=key)]),
        # A state of two arrays, which starts from constants.
        "block": prnn.mlstm_block(
            SIZE, solver=solver, num_heads=1, conv_width=3, block_size=SIZE, key=key
        ),
    }


@pytest.mark.parametrize(
    "name, kind, flags",
    [
        *((name, "Auto", True) for name in layers(None)),
        ("gru", "Auto", False),
        ("starts", "Explicit", False),
        ("convolution", "Explicit", True),
    ],
)
def test_layers(name, kind, flags):
    mask, reset = MASK[:LENGTH], RESET[:LENGTH]
    padded = jnp.where(jnp.expand_dims(mask, 1), XS[:LENGTH], jnp.nan)
    solver = prnn.AssociativeScan() if name in ("affine", "algebra", "starts") else None
    xs, options = (padded, {"mask": mask, "reset": reset}) if flags else (XS, {})

    @eqx.filter_jit
    def run(layer, xs):
        def loss(layer, xs):
            ys, final = layer(xs, **options)
            ys, state = layer(xs, final, **options)  # go on from there
            return jnp.sum(ys**2), (ys, final, state)

        return eqx.filter_value_and_grad(loss, has_aux=True)(layer, xs)

    expected = run(layers(None)[name], xs)
    with jax.set_mesh(mesh_of(8, kind)):
        got = run(layers(prnn.TimeSharded("time", solver))[name], xs)
    got, expected = (eqx.filter(x, eqx.is_array) for x in (got, expected))
    close(jax.tree.leaves(got), jax.tree.leaves(expected))
