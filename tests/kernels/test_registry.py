"""Rules of users, for primitives that kernels lack."""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import ad, batching, mlir
from sweeps import agree, both
from systems import INTERPRET, normal

import pararnn as prnn
from pararnn.kernels import fused_sweep, register_rule, unsupported

STARTS, XS = normal(0, (2, 4), np.float32, 0.5), normal(1, (6, 4), np.float32)
GEOMETRY = {"num_steps": 3, "stride": 3, "keep": False}


def primitive(name, function, abstract=lambda *avals, **_: avals[0]):
    """An elementwise primitive; kernels know nothing of it."""
    new = jex_core.Primitive(name)
    new.def_impl(function)
    new.def_abstract_eval(abstract)
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=False))

    def batch(args, axes, **params):
        size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
        moved = [
            jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
            for x, a in zip(args, axes, strict=True)
        ]
        return new.bind(*moved, **params), 0

    batching.primitive_batchers[new] = batch
    return new


def gate(h, *, beta):
    return h * jax.nn.sigmoid(beta * h)


@pytest.fixture(scope="module")
def swish():
    """Its derivative is a second primitive, in whose rule the first one is used."""

    def slope(h, t, *, beta):
        s = jax.nn.sigmoid(beta * h)
        return t * (s + beta * gate(h, beta=beta) * (1 - s))

    def slope_rule(h, t, *, beta):
        s = jax.nn.sigmoid(beta * h)
        return t * (s + beta * new.bind(h, beta=beta) * (1 - s))

    new, derivative = primitive("test_swish", gate), primitive("test_swish_slope", slope)
    ad.primitive_jvps[new] = lambda x, t, **params: (
        new.bind(*x, **params),
        derivative.bind(*x, *t, **params),
    )
    prnn.jaxprs.register_rule(derivative, prnn.jaxprs.elementwise)
    step = lambda h, x: new.bind(0.5 * h + x, beta=2.0)  # noqa: E731
    assert unsupported(step, STARTS, XS) == "the step uses `test_swish`"
    register_rule(new, gate)
    register_rule("test_swish_slope", slope_rule)  # the name will do
    return new


def test_a_step_with_a_rule_becomes_a_kernel(swish):
    weight = normal(2, (4, 4), np.float32, 0.3)

    def step(h, x):
        return jax.jit(lambda h: swish.bind(weight @ h, beta=1.5))(h) + x

    assert unsupported(step, STARTS, XS) is None
    agree(*both(step, STARTS, XS, **GEOMETRY))


def test_a_complex_step_with_a_rule(swish):
    def step(h, x):
        return jax.lax.complex(swish.bind(h.real, beta=2.0), h.imag) * 0.5 + x

    agree(*both(step, STARTS.astype("complex64"), XS.astype("complex64"), **GEOMETRY))


def test_tangents_take_the_rule_of_the_derivative(swish):
    def step(h, x):
        return swish.bind(0.5 * h + x, beta=2.0)

    def plain(h, x):
        return gate(0.5 * h + x, beta=2.0)

    solver = prnn.Newton(chunk_size=3, sweep_method=prnn.sweeps.Fused(interpret=INTERPRET))
    tangents = lambda carry, x: jax.jvp(step, (carry[0], x), (carry[1], 0 * x))  # noqa: E731
    assert unsupported(tangents, (STARTS, STARTS), XS) is None
    got = prnn.solve(step, XS, STARTS[0], solver=solver)
    expected = prnn.solve(plain, XS, STARTS[0], solver=prnn.Sequential())
    np.testing.assert_allclose(got.states, expected.states, rtol=1e-5, atol=1e-6)
    assert not got.stats.fallback


def test_a_rule_for_a_primitive_of_jax_with_several_results():
    def largest(h, *, k, **params):
        assert k == 1
        return [jnp.max(h, keepdims=True), jnp.zeros(1, np.int32)]

    def step(h, x):
        return 0.5 * h + jax.lax.top_k(x, 1)[0]

    assert "uses `top_k`" in str(unsupported(step, STARTS, XS))
    register_rule("top_k", largest)
    agree(*both(step, STARTS, XS, **GEOMETRY))


@pytest.mark.parametrize("name", ["tanh", "dot_general", "reshape", "scan", "jit", "conj"])
def test_supported_primitives_are_refused(name):
    with pytest.raises(ValueError, match=f"kernels support `{name}` already"):
        register_rule(name, jnp.tanh)


def test_a_second_rule_is_refused(swish):
    with pytest.raises(ValueError, match="kernels support `test_swish` already"):
        register_rule(swish, gate)


def test_types_are_checked(as_users_run_it):
    with pytest.raises(TypeError, match="`primitive` must be .*got 3"):
        register_rule(3, gate)
    with pytest.raises(TypeError, match="`rule` must be a function"):
        register_rule("no_such_rule", jex_core.Primitive)


def test_a_rule_that_fails_or_returns_something_else():
    failing, wide = primitive("test_failing", gate), primitive("test_wide", gate)

    def fail(h):
        raise RuntimeError("no")

    register_rule(failing, fail)
    register_rule(wide, lambda h: h.astype(np.float64))
    with pytest.raises(RuntimeError, match="no") as raised:
        fused_sweep(lambda h, x: failing.bind(h) + x, STARTS, XS, **GEOMETRY)
    assert "rule registered for the primitive `test_failing`" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match=r"`test_wide` must return .*float32.*got .*float64"):
        fused_sweep(lambda h, x: wide.bind(h) + x, STARTS, XS, **GEOMETRY)
