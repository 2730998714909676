"""Steps that cannot become a kernel, and how one learns why."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import pararnn as prnn
from pararnn.kernels import fused_sweep, unsupported

SIZE = 8
STARTS, XS = jnp.zeros((2, SIZE), np.float32), jnp.zeros((6, SIZE), np.float32)
GEOMETRY = {"num_steps": 3, "stride": 3, "keep": False}
WIDE = jnp.zeros((200, SIZE), np.float32)
LARGE = jnp.zeros((200, 200), np.float32)


def cast(dtype, function):
    """A step that computes in another dtype."""
    return lambda h, x: h + function(x.astype(dtype)).astype(h.dtype)


def shout(h, x):
    jax.debug.print("{x}", x=x[0])
    return h + x


def count(h, x):
    return h + io_callback(np.copy, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.parametrize(
    "step, reason",
    [
        (lambda h, x: jnp.sort(h) + x, "uses `sort`"),
        (lambda h, x: lax.fori_loop(0, 2, lambda i, h: h + x, h), "uses `scan`"),
        (lambda h, x: lax.while_loop(lambda h: h[0] < 1, lambda h: h + 1, h), "uses `while`"),
        (lambda h, x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, h), "uses `cond`"),
        (lambda h, x: h + jnp.argmax(x).astype(np.float32), "uses `argmax`"),
        (lambda h, x: h[jnp.int32(x[0])] + x, "uses `dynamic_slice` at an index that is computed"),
        (lambda h, x: jnp.real(lax.complex(h, x)), "computes with complex numbers"),
        (lambda h, x: WIDE.T @ (LARGE @ (WIDE @ h)), "a float32 matrix of 200 × 200"),
        (lambda h, x: h + jnp.outer(jnp.tile(h, 9), jnp.tile(x, 9))[0, :8], "more than 64 pieces"),
        (lambda h, x: functools.reduce(jnp.multiply, [x] * 1100, h), "needs too many operations"),
        (lambda h, x: h + jnp.concatenate([x, WIDE[0, :0]]), "has empty arrays"),
        (cast(np.int32, lambda x: lax.reduce_or(x, (0,))), "uses `reduce_or` of integers"),
        (cast(np.int32, jnp.bitwise_and.reduce), "uses `reduce_and` of integers"),
        (cast(np.int32, jnp.bitwise_xor.reduce), "uses `reduce_xor`"),
        (cast(np.float16, lambda x: lax.nextafter(x, x + 1)), "uses `nextafter` of float16"),
        (cast(jnp.bfloat16, lambda x: lax.nextafter(x, x + 1)), "uses `nextafter` of bfloat16"),
        (shout, "uses `debug_print`, which has an effect"),
        (lambda h, x: h + jax.checkpoint(shout)(h, x), "uses `debug_print`, which has an effect"),
        (count, "uses `io_callback`, which has an effect"),
        (cast(bool, lambda x: x @ x), "multiplies booleans"),
        (cast(np.uint64, lambda x: x + 1), "has arrays of uint64"),
        (lambda h, x: h[:4], "makes a carry of other shapes or dtypes than the one it takes"),
    ],
)
def test_reasons(step, reason):
    why = unsupported(step, STARTS, XS)
    assert why is not None and why.startswith("the step ") and reason in why
    with pytest.raises(ValueError, match="`step` cannot become a kernel: it.*" + re.escape(reason)):
        fused_sweep(step, STARTS, XS, **GEOMETRY)


def test_effects_of_steps_that_seem_to_need_none():
    """Neither of what depends on nothing, nor inside what a kernel would evaluate before."""

    def constant(h, x):
        jax.debug.callback(lambda: None)
        return h + x

    def branch(h, x):
        lax.cond(WIDE[0, 0] > 0, lambda: None, lambda: jax.debug.callback(lambda: None))
        return h + x

    def number(h, x):
        jax.debug.callback(lambda _: None, h.real)
        return h + x.astype(h.dtype)

    for step, starts in (
        (constant, STARTS),
        (branch, STARTS),
        (number, STARTS.astype("complex64")),
    ):
        why = unsupported(step, starts, XS)
        assert why is not None and why.endswith("which has an effect")


def test_effects_happen():
    seen = []

    def step(h, x):
        jax.debug.callback(lambda x: seen.append(float(x)), x[0])
        return 0.5 * h + x

    xs = XS + jnp.arange(6, dtype=np.float32)[:, None]
    solver = prnn.Newton(chunk_size=3, sweep_method=prnn.sweeps.Fused(interpret=True))
    jax.block_until_ready(prnn.solve(step, xs, STARTS[0], solver=solver))
    jax.effects_barrier()
    assert set(seen) >= set(range(6))


def test_dtypes_that_kernels_lack():
    keys = jax.random.split(jax.random.key(0), len(XS))
    for xs in ((XS, keys), (XS, XS.astype(jnp.float8_e4m3fn))):
        assert "has arrays of " in str(unsupported(lambda h, x: h + x[0], STARTS, xs))
    assert unsupported(lambda h, x: h, STARTS[:, :0], XS) == "the step has an empty state"


def test_cells_that_are_large():
    key = jax.random.key(0)
    for cell, reason in [
        (prnn.M2RNN(3, 2, 64, 16, key=key), "more than 64 pieces"),
        (prnn.DiagonalGRU(3, 5000, key=key), "more than 4096 units"),
        (prnn.GRU(3, 256, key=key), "matrix of 256 × 256"),
    ]:
        us = jax.eval_shape(cell.project, jax.ShapeDtypeStruct((6, 3), np.float64))
        state = jax.eval_shape(cell.init_state)
        starts = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), state)
        assert reason in unsupported(cell.step, starts, us)


def test_arrays_on_a_mesh():
    mesh = jax.make_mesh((1,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("time")
    reasons = []

    @jax.shard_map(mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    def sharded(starts, xs):
        reasons.append(unsupported(lambda h, x: h + x, starts, xs))
        return starts

    jax.eval_shape(sharded, STARTS, XS)
    assert reasons == ["the step runs inside `jax.shard_map`"]
    mesh = jax.make_mesh((1,), ("time",), axis_types=(jax.sharding.AxisType.Explicit,))
    xs = jax.device_put(XS, jax.sharding.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        reason = unsupported(lambda h, x: h + x, STARTS, xs)
    assert reason == "the step runs on a mesh with explicit axes"


def test_states_are_kept_of_chunks_side_by_side():
    for geometry in ({"stride": 2}, {"stride": 3, "first": -1}):
        with pytest.raises(ValueError, match="`keep` needs adjacent chunks"):
            fused_sweep(lambda h, x: h + x, STARTS, XS, num_steps=3, keep=True, **geometry)


def test_places_that_take_more_than_32_bits():
    xs = jax.ShapeDtypeStruct((2**20, 2048), np.float32)
    starts = jax.ShapeDtypeStruct((4, 2048), np.float32)
    assert "2^31" in unsupported(lambda h, x: 0.5 * h + x, starts, xs)
    narrow = jax.ShapeDtypeStruct((2**20, 1), np.float32)
    assert "2^31" in unsupported(lambda h, x: 0.5 * h + x, starts, narrow)


def test_a_release_of_jax_without_the_backend(monkeypatch):
    monkeypatch.setattr("pararnn.kernels._pallas.plt", None)
    why = unsupported(lambda h, x: 0.5 * h + x, STARTS, XS)
    assert why is not None and "this release of JAX lacks" in why
    solver = prnn.Newton(chunk_size=3, sweep_method=prnn.sweeps.Fused())
    solution = prnn.solve(lambda h, x: 0.5 * h + x, XS, STARTS[0], solver=solver)
    assert solution.result == prnn.RESULTS.successful
