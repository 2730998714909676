"""Kernels of steps that no cell of the package has, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import agree, both, starts_like

from pararnn.kernels import unsupported

SIZE, CHUNKS, STEPS = 6, 3, 3
LENGTH = CHUNKS * STEPS - 1
RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(0.5 * RNG.standard_normal(shape), np.float32)


W, V, A, B = normal(SIZE, SIZE), normal(2 * SIZE, 2 * SIZE), normal(SIZE), normal(SIZE)
HEADS = normal(2, 3, 3)
VECTOR = jnp.zeros(SIZE, np.float32)
MATRIX = jnp.zeros((3, 8), np.float32)
FLAGS = jnp.asarray(RNG.integers(0, 2, LENGTH), bool)
STEPS_OF = {}


def step_of(init, xs=None):
    """Registers a step with an initial state and inputs, of the same shape if none are given."""

    def register(step):
        rows = normal(LENGTH, *init.shape) if xs is None else xs
        STEPS_OF[step.__name__] = (step, init, rows)
        return step

    return register


@step_of(jnp.zeros(2 * SIZE, np.float32), normal(LENGTH, SIZE))
def packed_state(s, x):
    h, c = jnp.split(s, 2)
    c = jax.nn.sigmoid(A * h + x) * c + jnp.tanh(x)
    return jnp.concatenate([jnp.tanh(c), c])


@step_of(jnp.zeros(10, np.float32), normal(LENGTH, 10))
def unequal_parts(s, x):
    a, b, c = s[:3], s[3:4], s[4:]
    return jnp.concatenate([a * b, jnp.sin(b), c + c[0]]) + x


@step_of(VECTOR)
def normalised(h, x):
    h = h + x
    mean = jnp.mean(h, keepdims=True)
    var = jnp.mean(jnp.square(h - mean), keepdims=True)
    return A * (h - mean) * lax.rsqrt(var + 1e-5) + B


@step_of(VECTOR)
def residual_mlp(h, x):
    return h + 0.1 * (W.T @ jax.nn.relu(W @ h + x)) - 0.1 * h


@step_of(VECTOR)
def clipped(h, x):
    h = jnp.where(h > x, jnp.clip(h + x, -0.3, 0.4), 2 * x)
    return jnp.minimum(jnp.maximum(h, -jnp.abs(x)), jnp.sign(x) + 0.1)


@step_of(VECTOR)
def softened(h, x):
    return jax.nn.softplus(A * h) + jax.nn.gelu(x, approximate=False) * lax.erf(h) - lax.erfc(x)


@step_of(VECTOR)
def many_functions(h, x):
    y = jnp.exp2(-jnp.abs(h)) + jnp.log1p(jnp.square(x)) + jnp.expm1(-(h**2)) + (1 + h**2) ** -2
    z = jnp.cosh(x) - lax.cbrt(x) + jnp.round(3 * h) + jnp.floor(x) + jnp.arctan2(h, x)
    return 0.2 * (y + z)


@step_of(VECTOR, (normal(LENGTH, SIZE), FLAGS))
def resets(h, inputs):
    x, reset = inputs
    return jnp.where(reset, A, jnp.tanh(B * h + x))


@step_of(VECTOR, (normal(LENGTH, SIZE), jnp.arange(LENGTH)))
def clock(h, inputs):
    x, time = inputs
    return jnp.where(time % 3 == 0, h, h * jnp.cos(0.1 * time.astype(np.float32)) + x)


@step_of(jnp.zeros((), np.float32), normal(LENGTH))
def scalar(h, x):
    return jnp.tanh(1.5 * h + x)


@step_of(jnp.zeros((), np.float32), normal(LENGTH, SIZE))
def scalar_of_vectors(h, x):
    return jnp.tanh(h + A @ x) + jnp.max(x) * jnp.min(A * h)


@step_of(MATRIX)
def matrix_state(s, x):
    return jnp.tanh(normal_weight() @ s) * jax.nn.sigmoid(jnp.sum(x, axis=0, keepdims=True)) + x


def normal_weight():
    return jnp.reshape(jnp.arange(9.0, dtype=np.float32), (3, 3)) / 9


@step_of(MATRIX)
def fast_weights(s, x):
    return jnp.outer(x[:, 0], x[:, 1]) @ (s + x) + jnp.mean(s, axis=1, keepdims=True)


@step_of(jnp.zeros((3, 3), np.float32))
def transposed_state(s, x):
    return 0.5 * (s.T + x) @ jnp.flip(s, 0) + jnp.eye(3, dtype=np.float32)


@step_of(VECTOR)
def heads(h, x):
    mixed = jnp.einsum("hij,hj->hi", HEADS, h.reshape(2, 3)).reshape(-1)
    return jnp.tanh(mixed + x)


@step_of(VECTOR)
def heads_that_are_normalised(h, x):
    h = h.reshape(2, 3) + x.reshape(2, 3)
    weights = jax.nn.softmax(h, axis=-1)
    return (weights - jnp.max(jnp.abs(h), axis=-1, keepdims=True)).reshape(-1)


@step_of(VECTOR)
def weights_that_are_repeated(h, x):
    h = jnp.tanh(h @ jnp.repeat(W[:, :2], 3, axis=1) + x)
    return jnp.tanh(jnp.tile(W[:2, ::2], (3, 2)) @ h + x)


@step_of(VECTOR)
def weights_that_are_regrouped(h, x):
    regrouped = jnp.transpose(V.reshape(2, 6, 3, 4), (1, 3, 0, 2))[:, :2].reshape(6, 12)
    return jnp.tanh(regrouped @ jnp.concatenate([h, x]))


@step_of(VECTOR)
def heads_that_share_weights(h, x):
    shared = jnp.broadcast_to(HEADS[0, :, None], (3, 2, 3)).reshape(6, 3)
    return jnp.tanh(shared @ jnp.sum(h.reshape(2, 3), axis=0) + x)


@step_of(VECTOR)
def both_ways(h, x):
    return jnp.tanh(W @ h + W.T @ x) - (1 - A) * jax.nn.softplus(B)


@step_of(VECTOR, normal(LENGTH, SIZE, SIZE))
def weights_in_the_inputs(h, x):
    return jnp.tanh(x @ h)


@step_of(VECTOR)
def neighbours(h, x):
    return jnp.tanh(jnp.roll(h, 1) - 0.5 * jnp.pad(h[1:], (0, 1)) + jnp.flip(x))


@step_of(VECTOR)
def second_derivatives(h, x):
    energy = lambda h: jnp.sum(jnp.log(jnp.cosh(W @ h + x)))  # noqa: E731
    return h - 0.1 * jax.grad(energy)(h) + 0.01 * jax.jvp(jax.grad(energy), (h,), (A,))[1]


@step_of(jnp.zeros(5, np.int32), jnp.asarray(RNG.integers(0, 99, (LENGTH, 5)), np.int32))
def integers(n, x):
    bits = (n ^ (x << 2)) & 1023 | (x >> 1)
    return lax.rem(bits * 31 + x, jnp.full_like(x, 1009)) + lax.population_count(x)


@step_of(jnp.zeros(SIZE, np.complex64), normal(LENGTH, SIZE))
def complex_state(h, x):
    rotated = jnp.exp(lax.complex(0 * x, x)) * (lax.complex(W, W.T) @ jnp.conj(h))
    parts = jnp.split(0.2 * rotated + jnp.square(h).sum() * x.astype(h.dtype), 2)
    h = h - jnp.tanh(h.real).astype(h.dtype)
    return jnp.where(x > 0, jnp.concatenate(parts[::-1]), jnp.flip(h))


@step_of(jnp.zeros((4, 3), bool), jnp.asarray(RNG.integers(0, 9, (LENGTH, 4, 3)), np.int32))
def flags(on, x):
    extremes = jnp.max(on, axis=1, keepdims=True) ^ jnp.min(x > 4, axis=0, keepdims=True)
    odd = jnp.maximum(on, x % 2 == 1) & ~jnp.minimum(on, jnp.any(x > 7, axis=1, keepdims=True))
    return lax.select_n(x % 3, odd, extremes, (odd | on) ^ jnp.all(on))


@pytest.mark.parametrize("name", STEPS_OF)
def test_steps(name):
    step, init, xs = STEPS_OF[name]
    starts = starts_like(init, CHUNKS)
    assert unsupported(step, starts, xs) is None
    agree(*both(step, starts, xs, num_steps=STEPS, stride=STEPS, keep=True))


def test_nested_states():
    init = {"a": VECTOR, "b": (jnp.zeros((), np.float32), {"on": jnp.zeros((), bool)})}
    xs = {"x": normal(LENGTH, SIZE), "reset": FLAGS}

    def step(state, x):
        total, flag = state["b"]
        a = jnp.where(flag["on"], state["a"], jnp.tanh(A * state["a"] + x["x"]))
        total = 0.5 * total + jnp.sum(a)
        return {"a": a, "b": (total, {"on": x["reset"] | (total > 1)})}

    agree(*both(step, starts_like(init, CHUNKS), xs, num_steps=STEPS, stride=STEPS, keep=True))


def test_leaves_without_elements():
    nothing = jnp.zeros((2, 0), np.float32)
    init, xs = (nothing, VECTOR, nothing), {"a": jnp.zeros((LENGTH, 0)), "b": normal(LENGTH, SIZE)}

    def step(state, x):
        nothing, h, other = state
        h = jnp.tanh(A * h + x["b"] + jnp.sum(x["a"]).astype(h.dtype))
        return (
            other + jnp.sum(h),
            h + jnp.sum(jnp.ones((SIZE, 2), h.dtype) @ other, axis=1),
            nothing,
        )

    starts = starts_like(init, CHUNKS)
    assert unsupported(step, starts, xs) is None
    agree(*both(step, starts, xs, num_steps=STEPS, stride=STEPS, keep=True))


def test_what_is_not_a_number_stays_so():
    """As XLA does, and other compilers of kernels do not."""

    def step(h, x):
        return jnp.maximum(h, x) + jnp.minimum(x, h) + jnp.clip(h, 0, 1) + jnp.max(h) * 0

    starts = starts_like(VECTOR, CHUNKS).at[1, 2].set(np.nan)
    xs = normal(LENGTH, SIZE).at[0, 3].set(np.nan)
    fused, plain = both(step, starts, xs, num_steps=1, stride=1, keep=False)
    np.testing.assert_array_equal(np.isnan(fused[0]), np.isnan(plain[0]))
    assert np.isnan(plain[0]).any(axis=1)[:2].all()
