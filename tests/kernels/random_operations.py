"""Operations of random steps, by their names."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _safe(x):
    return jnp.abs(x) + jnp.asarray(0.5, x.dtype)


def _moderate(x):
    return jnp.clip(x, -3, 3)


UNARY: dict[str, Callable[[Any], Any]] = {
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tanh": jnp.tanh,
    "exp": lambda x: jnp.exp(_moderate(x)),
    "expm1": lambda x: jnp.expm1(_moderate(x)),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "abs": jnp.abs,
    "neg": lax.neg,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": lambda x: jnp.round(2 * x),
    "away": lambda x: lax.round(3 * x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "sign": jnp.sign,
    "square": jnp.square,
    "cube": lambda x: _moderate(x) ** 3,
    "inverse square": lambda x: _safe(x) ** -2,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "sqrt": lambda x: jnp.sqrt(_safe(x)),
    "rsqrt": lambda x: lax.rsqrt(_safe(x)),
    "cbrt": jnp.cbrt,
    "erf": lax.erf,
    "finite": lambda x: jnp.where(jnp.isfinite(x), x, 0),
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "softmax": lambda x: jax.nn.softmax(x.reshape(-1)).reshape(x.shape),
    "gradient": lambda x: jax.grad(
        lambda y: jnp.sum(jnp.tanh(y) * jnp.flip(y.reshape(-1)).reshape(y.shape))
    )(x),
    "kept": lambda x: jax.checkpoint(lambda y: jnp.sin(y) * y)(x),
    "constant": lambda x: (
        x + jnp.arange(x.size, dtype=np.int32).reshape(x.shape).astype(x.dtype) / 8
    ),
    "zero": lambda x: jnp.zeros_like(x) + x.reshape(-1)[0],
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lax.add,
    "sub": lax.sub,
    "mul": lax.mul,
    "max": lax.max,
    "min": lax.min,
    "div": lambda a, b: a / _safe(b),
    "rem": lambda a, b: lax.rem(a, _safe(b)),
    "atan2": lambda a, b: jnp.arctan2(a, _safe(b)),
    "pow": lambda a, b: _safe(a) ** _moderate(b),
    "clamp": lambda a, b: lax.clamp(-jnp.abs(b), a, jnp.abs(b)),
    "nextafter": lax.nextafter,
}
INTEGERS: dict[str, Callable[[Any, Any], Any]] = {
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
    "add": lax.add,
    "sub": lax.sub,
    "mul": lax.mul,
    "max": lax.max,
    "div": lax.div,
    "rem": lax.rem,
    "mod": jnp.remainder,
    "left": lax.shift_left,
    "right": lax.shift_right_logical,
    "arithmetic": lax.shift_right_arithmetic,
    "bits": lambda a, b: lax.population_count(a) ^ ~b,
    "sign": lambda a, b: jnp.sign(a) + b,
}
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum,
    "max": jnp.max,
    "min": jnp.min,
    "mean": jnp.mean,
    "var": jnp.var,
    "logsumexp": jax.nn.logsumexp,
    "prod": jnp.prod,
    "argmax": lambda v, axis, keepdims: jnp.argmax(v, axis[0], keepdims=keepdims),
}
REDUCTIONS_OF_INTEGERS: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum,
    "max": jnp.max,
    "min": jnp.min,
    "all": jnp.all,
    "any": jnp.any,
    "bits": lambda v, axis, keepdims: lax.reduce_or(v, axis),
    "same bits": lambda v, axis, keepdims: lax.reduce_xor(v, axis),
}
REDUCTIONS_OF_BOOLEANS: dict[str, Callable[..., Any]] = {
    "all": jnp.all,
    "any": jnp.any,
    "max": jnp.max,
    "min": jnp.min,
    "count": lambda v, axis, keepdims: jnp.sum(v, axis, dtype=np.int32, keepdims=keepdims),
}
COMPLEX: dict[str, Callable[[Any], Any]] = {
    "conj": jnp.conj,
    "neg": lax.neg,
    "square": lambda z: jnp.square(0.5 * z),
    "exp": lambda z: 0.25 * jnp.exp(lax.complex(_moderate(z.real), z.imag)),
    "turn": lambda z: z * jnp.asarray(1j, z.dtype),
}


def moves_of(
    shape: Sequence[int],
    axis: int,
    cut: int,
    shift: int,
    order: Sequence[int],
    split: Sequence[int],
) -> dict[str, Callable[[Any], Any]]:
    """Moves of the elements of a value of this shape.

    **Arguments:**

    - `axis`, `cut`, `shift`: along which axis, where and how far.
    - `order`: a permutation of the axes.
    - `split`: another shape of as many elements.
    """
    n = shape[axis]
    return {
        "transpose": lambda v: v.transpose(order),
        "flatten": lambda v: v.reshape(-1),
        "refactor": lambda v: v.reshape(split),
        "regroup": lambda v: v.reshape(split).swapaxes(0, -1).reshape(-1),
        "flip": lambda v: jnp.flip(v, axis),
        "roll": lambda v: jnp.roll(v, shift, axis),
        "halves": lambda v: jnp.concatenate(jnp.split(v, [cut][: n - 1], axis)[::-1], axis),
        "slice": lambda v: lax.slice_in_dim(v, cut - 1, n, axis=axis),
        "stride": lambda v: lax.slice_in_dim(v, 0, n, 2, axis),
        "index": lambda v: lax.index_in_dim(v, cut - 1, axis, keepdims=False),
        "expand": lambda v: jnp.expand_dims(v, axis),
        "squeeze": lambda v: jnp.squeeze(v, [k for k, m in enumerate(shape) if m == 1]),
        "repeat": lambda v: jnp.repeat(v, 2, axis),
        "tile": lambda v: jnp.tile(v, [2 if k == axis else 1 for k in range(len(shape))]),
        "stack": lambda v: jnp.stack([v, jnp.flip(v, axis)], axis),
        "broadcast": lambda v: jnp.broadcast_to(v, (2, *shape)),
        "update": lambda v: lax.dynamic_update_slice_in_dim(
            v, lax.slice_in_dim(v, 0, 1, axis=axis), cut - 1, axis
        ),
        "dynamic": lambda v: lax.dynamic_slice_in_dim(v, cut, n - cut or 1, axis),
        "pad": lambda v: lax.pad(
            v,
            jnp.zeros((), v.dtype),
            [(1, -1, 1) if k == axis else (0, 0, 0) for k in range(len(shape))],
        ),
    }
