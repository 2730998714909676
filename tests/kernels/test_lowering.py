"""All functions of kernels are known to the GPU compiler, as far as JAX lowers them here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pararnn.jaxprs._walk import equations
from pararnn.kernels import fused_sweep

REAL = [
    *(lax.abs, lax.neg, lax.ceil, lax.floor, lax.exp, lax.exp2, lax.expm1, lax.log, lax.log1p),
    *(lax.sqrt, lax.cbrt, lax.rsqrt, lax.sin, lax.cos, lax.tan, lax.asin, lax.acos, lax.atan),
    *(lax.sinh, lax.cosh, lax.tanh, lax.asinh, lax.acosh, lax.atanh, lax.logistic, lax.sign),
    *(lax.square, lax.erf, lax.erfc, jnp.round, lax.round, lax.stop_gradient),
    *(lambda x: x**5, lambda x: x**-3, lambda x: jnp.where(lax.is_finite(x), x, 0)),
    *(lambda x: jnp.max(x) + jnp.min(x) + jnp.sum(x) + x, lambda x: jnp.where(x.any(), x, 1)),
]
PAIRS = [lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.pow, lax.atan2, lax.max, lax.min]
COMPARED = [lax.eq, lax.ne, lax.gt, lax.ge, lax.lt, lax.le]
WHOLE = [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.add, lax.sub, lax.mul, lax.max]
WHOLE += [lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical, lax.rem, lax.div]


def lowered(step, dtype):
    """What a sweep of a step becomes for a GPU; without one, JAX is told its name."""
    mesh = jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", 1, "cuda")
    )
    arrays = [jax.ShapeDtypeStruct((n, 48), dtype) for n in (4, 12)]

    def sweep(starts, xs):
        return fused_sweep(step, starts, xs, num_steps=3, stride=3, keep=True)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(sweep).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def steps(dtype):
    if jnp.issubdtype(dtype, jnp.integer):
        return [*WHOLE, lambda h, x: ~h + lax.population_count(x) + lax.sign(h)]
    compared = [lambda h, x, f=f: jnp.where(f(h, x), h, x) for f in COMPARED]
    return [*(lambda h, x, f=f: f(h) + x for f in REAL), *PAIRS, *compared]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.int32])
def test_functions(dtype):
    functions = steps(dtype)
    for start in range(0, len(functions), 6):
        some = functions[start : start + 6]
        assert "triton" in lowered(lambda h, x, some=some: sum(f(h, x) for f in some), dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint32])
def test_functions_that_are_written_out(dtype):
    """As the compiler has them for some dtypes only, or for other values than XLA."""

    def step(h, x):
        on = jnp.max(h > x) | jnp.all(jnp.maximum(h > x, x == 0) ^ jnp.minimum(h < x, x == 0))
        n = lax.population_count(h) + (h << x) + (h >> x) + h // x + lax.rem(h, x)
        return jnp.where(on, n, lax.select_n((x & 3).astype(np.int32), n, h, x, ~n))

    assert "triton" in lowered(step, dtype)


def test_products_of_float32_take_three_passes():
    w = jnp.zeros((48, 48), np.float32)

    def sweep(h, x):
        step = lambda h, x: w @ h + x  # noqa: E731
        return fused_sweep(step, h, x, num_steps=3, stride=3, keep=False)

    jaxpr = jax.make_jaxpr(sweep)(jnp.zeros((4, 48), np.float32), jnp.zeros((12, 48), np.float32))
    (dot,) = (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general")
    assert dot.params["precision"] == lax.DotAlgorithmPreset.TF32_TF32_F32_X3
