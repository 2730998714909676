r"""Decays: how they follow from inputs, and the products of those of several steps.

A decay $α$ in $(0, 1)$ has one of three forms, of which the first two come from the input:

- a rate times a time step, as in Mamba: $\log α = -e^{A_{\log}}\, \mathrm{softplus}(a + b)$
  (`time_step`, `rate_decay`);
- a forget gate, as in an LSTM: $\log α = \log σ(a) / r$ (`log_gate`);
- a continuous-time system, held over a step: $α = e^{ΛΔ}$ (`_zero_order_hold.py`).

Where a chunk of steps is made at once, the decays between any two of them are needed: from step $s$
to step $t$ that is the product of the decays of the steps after $s$ up to $t$, and 0 if one of them
starts anew. With a reset at step 2, from before the chunk (│) and from each step:

           │      0      1      2      3
    t = 0  a0     1      0      0      0
        1  a1a0   a1     1      0      0
        2  0      0      0      1      0
        3  0      0      0      a3     1

A quotient of running products would overflow, and a difference of running sums of logarithms is
wrong by the rounding of large sums. So nothing is divided or subtracted.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._misc import over_rows
from ._parts import at_least_float32, default_dtype, inverse_softplus, log_uniform

# The logarithm of a decay to nothing. Finite, so that it times 0 is 0; sums of many are in the
# range of float32, and no exponential survives it.
LOG_ZERO = -1e30

# --- a rate times a time step -----------------------------------------------------------------


def init_time_step(key: PRNGKeyArray, size: int, dtype: Any) -> Float[Array, " size"]:
    r"""The bias $b$ of `time_step`: $\mathrm{softplus}(b)$ is log-uniform in
    $(10^{-3}, 10^{-1})$."""
    bias = inverse_softplus(log_uniform(key, (size,), 1e-3, 0.1))
    return bias.astype(default_dtype(dtype))


def time_step(raw: Float[Array, "L size"], bias: Float[Array, " size"]) -> Float[Array, "L size"]:
    r"""$Δ = \mathrm{softplus}(a + b)$, in at least float32."""
    return jax.nn.softplus(at_least_float32(raw) + jnp.expand_dims(at_least_float32(bias), 0))


def init_rate(
    key: PRNGKeyArray, num_heads: int, least: float, dtype: Any
) -> Float[Array, " num_heads"]:
    r"""$A_{\log}$, with $A$ uniform from `least` to 16."""
    rate = jax.random.uniform(key, (num_heads,), minval=least, maxval=16)
    return jnp.log(rate).astype(default_dtype(dtype))


def init_decay(
    num_heads: int, dtype: Any, key: PRNGKeyArray
) -> tuple[Float[Array, " heads"], Float[Array, " heads"]]:
    r"""$A_{\log}$ and $b$ as in Mamba-2: $A$ uniform in $(0, 16)$, and $b$ as of
    `init_time_step`."""
    key_a, key_b = jax.random.split(key)
    # A sample may be the left end of its interval; the logarithm of 0 would be infinite.
    return init_rate(key_a, num_heads, 1e-4, dtype), init_time_step(key_b, num_heads, dtype)


def log_rate_decay(
    delta: Float[Array, "L heads"], a_log: Float[Array, " heads"]
) -> Float[Array, "L heads"]:
    r"""$-e^{A_{\log}} Δ$, in at least float32: near 1, the decay itself has no resolution in
    bfloat16."""
    return -delta * jnp.expand_dims(jnp.exp(at_least_float32(a_log)), 0)


def rate_decay(
    raw: Float[Array, "L heads"], a_log: Float[Array, " heads"], bias: Float[Array, " heads"]
) -> Float[Array, "L heads"]:
    r"""$\exp(-e^{A_{\log}}\, \mathrm{softplus}(a + b))$: the forget gate of Mamba, from $a$,
    `raw`."""
    return jnp.exp(log_rate_decay(time_step(raw, bias), a_log))


# --- a forget gate ----------------------------------------------------------------------------


def init_forget_bias(num_heads: int, dtype: Any) -> Float[Array, " num_heads"]:
    """Biases of a gate that forgets slowly: from 3 to 6 over the heads."""
    return jnp.linspace(3, 6, num_heads, dtype=dtype)


def log_gate(raw: Float[Array, "*axes"], root: int = 1) -> Float[Array, "*axes"]:
    r"""$\log σ(a) / r$, in at least float32; with a root $r > 1$, decays start near 1."""
    log = jax.nn.log_sigmoid(at_least_float32(raw))
    return log if root == 1 else log / root


# --- decays of several steps ------------------------------------------------------------------


def with_resets(
    log_decay: Float[Array, "T heads *channels"], reset: Bool[Array, " T"] | None
) -> Float[Array, "T heads *channels"]:
    """The logarithms of decays, finite; none stays of what is before a step that starts anew."""
    logs = jnp.maximum(at_least_float32(log_decay), LOG_ZERO)
    return logs if reset is None else jnp.where(over_rows(reset, logs), LOG_ZERO, logs)


def chunk_decay(
    log_decay: Float[Array, "T heads *channels"], reset: Bool[Array, " T"] | None
) -> Float[Array, "heads channels 1"]:
    """The decay of a whole chunk: the factor of each row of the state that arrives."""
    logs = jnp.sum(with_resets(log_decay, reset), axis=0)
    return jnp.exp(logs).reshape(len(logs), -1, 1)


def segment_log_decays(
    log_decay: Float[Array, "T heads"], reset: Bool[Array, " T"] | None
) -> tuple[Float[Array, "heads T T"], Float[Array, "heads T"]]:
    """The logarithms of decays: from each step (second) to each later one (first), `LOG_ZERO` to
    earlier ones; and from the state that arrives to each step. Each is the sum of just the
    logarithms that count, by a product with masks."""
    logs = with_resets(log_decay, reset).T
    upto = np.tri(logs.shape[1])
    after = np.tri(logs.shape[1], k=-1)
    with jax.default_matmul_precision("highest"):
        terms = jnp.expand_dims(jnp.asarray(after, logs.dtype), 0) * jnp.expand_dims(logs, 2)
        between = jnp.einsum("tr,nrs->nts", jnp.asarray(upto, logs.dtype), terms)
    arriving = between[:, :, 0] + logs[:, :1]
    return jnp.where(jnp.expand_dims(upto > 0, 0), between, LOG_ZERO), arriving


def segment_decays(
    decay: Float[Array, "T heads"], reset: Bool[Array, " T"] | None
) -> tuple[Float[Array, "heads T T"], Float[Array, "heads T"]]:
    """As `segment_log_decays`, of decays themselves and to decays, by products: they may be 0, and
    are differentiated there, too."""
    if reset is not None:
        decay = jnp.where(jnp.expand_dims(reset, 1), 0, decay)
    length = len(decay)
    # In column 0 the decays of all steps, in column s + 1 those of the steps after s.
    counts = jnp.asarray(np.tri(length, length + 1, dtype=bool))
    factors = jnp.where(jnp.expand_dims(counts, 0), jnp.expand_dims(decay.T, 2), 1)
    products = jnp.cumprod(factors, axis=1)
    return jnp.tril(products[:, :, 1:]), products[:, :, 0]
