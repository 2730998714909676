"""Families of seeded random recurrences, from harmless to hostile.

A step is `step(w, state, x)` with weights of shape (3, 6, 6) and inputs of 6 features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 6
SCALES = 10.0 ** np.arange(-6, 6, 2)  # of the units of a leaf
DELAY = 3
AXIS = "sequences"

State = Any
Step = Callable[[jax.Array, State, jax.Array], State]


class Family(NamedTuple):
    """Recurrences of one kind.

    - `step`: as above.
    - `init`: makes a state of what is drawn for it, 6 numbers.
    - `exchanges`: whether steps exchange values with other sequences, along `AXIS`.
    - `affine`: whether they are affine in the state.
    """

    step: Step
    init: Callable[[jax.Array], State] = lambda h: h
    exchanges: bool = False
    affine: bool = False


def _elman(w, h, x):
    return jnp.tanh(w[0] @ h + x)


def _gru(w, h, x):
    z, r = jax.nn.sigmoid(w[0] @ h + x), jax.nn.sigmoid(w[1] @ h - x)
    return (1 - z) * jnp.tanh(w[2] @ (r * h) + x) + z * h


def _diagonal_gru(w, h, x):
    a, b, c = (jnp.diag(m) for m in w)
    z, r = jax.nn.sigmoid(a * h + x), jax.nn.sigmoid(b * h - x)
    return (1 - z) * jnp.tanh(c * r * h + x) + z * h


def _lstm(w, state, x):
    c, h = jnp.split(state, 2)
    f, i = jax.nn.sigmoid(w[0][:3, :3] @ h + x[:3]), jax.nn.sigmoid(w[1][:3, :3] @ h + x[3:])
    c = f * c + i * jnp.tanh(w[2][:3, :3] @ h + x[:3])
    return jnp.concatenate([c, jnp.tanh(c)])


def _sine(w, h, x):
    return jnp.sin(jnp.diag(w[0]) * 2 * h + x)


def _scales(x):
    return jnp.asarray(SCALES, x.dtype)


def _mixed_scales(w, h, x):
    return _scales(h) * _gru(w, h / _scales(h), x)


def _mixed_dtypes(w, state, x):
    h, slow = state
    new = jnp.tanh(w[0] @ h + slow.astype(h.dtype) + x)
    kept = (0.9 * slow.astype(h.dtype) + 0.1 * jnp.tanh(w[1] @ h)).astype(slow.dtype)
    return new, kept


def _delay(w, state, x):
    h, line = state
    new = jnp.tanh(w[0] @ h + w[1] @ line[-1] + x)
    return new, jnp.concatenate([jnp.expand_dims(h, 0), line[:-1]])


def _clock(w, state, x):
    h, time = state
    return jnp.tanh(w[0] @ h + x * jnp.sin(0.1 * time)), time + 1


def _latch(w, h, x):
    """Each unit keeps its sign, until an input is large."""
    return jnp.tanh((1 + jnp.abs(jnp.diag(w[0]))) * h + jnp.where(jnp.abs(x) > 2, 5 * x, 0))


def _rotation(w, h, x):
    """Pairs that turn and never shrink."""
    (a, b), angle = jnp.split(h, 2), 0.3 * jnp.diag(w[0])[:3] + 0.1 * x[:3]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos * a - sin * b, sin * a + cos * b])


def _logistic(w, h, x):
    """The logistic map, chaotic for most factors."""
    factor = 3.5 + 0.5 * jax.nn.sigmoid(jnp.diag(w[0]))
    return jnp.clip(factor * h * (1 - h) + 1e-3 * x, 0, 1)


def _clamp(w, h, x):
    middle, width = jnp.sum(w[0], 1) + x, jnp.abs(jnp.sum(w[1], 1))
    return jnp.clip(h + 0.1 * x, middle - width, middle + width)


def _rectifier(w, h, x):
    return jax.nn.relu(w[0] @ h + x)


def _collective(w, h, x):
    return jnp.tanh(w[0] @ h + w[1] @ jax.lax.pmean(h, AXIS) + x)


def _narrower(h):
    return h.astype(jnp.bfloat16 if h.dtype == jnp.float32 else jnp.float32)


FAMILIES: dict[str, Family] = {
    "Elman": Family(_elman),
    "GRU": Family(_gru),
    "diagonal GRU": Family(_diagonal_gru),
    "LSTM": Family(_lstm),
    "sine": Family(_sine),
    "mixed scales": Family(_mixed_scales, lambda h: _scales(h) * h),
    "mixed dtypes": Family(_mixed_dtypes, lambda h: (h, _narrower(h))),
    "delay": Family(_delay, lambda h: (h, jnp.zeros((DELAY, SIZE), h.dtype))),
    "clock": Family(_clock, lambda h: (h, jnp.zeros((), h.dtype))),
    "latch": Family(_latch, jnp.tanh),
    "rotation": Family(_rotation, affine=True),
    "logistic map": Family(_logistic, jax.nn.sigmoid),
    "clamp": Family(_clamp),
    "rectifier": Family(_rectifier),
    "collective": Family(_collective, exchanges=True),
}
