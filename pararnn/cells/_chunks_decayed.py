r"""Decayed outer products, step by step and chunk by chunk: per head,

$$S_t = \mathrm{diag}(a_t) S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t, \qquad 0 ≤ a_t ≤ 1.$$

A chunk is made by products of matrices: of its queries with its keys and values, and with the state
that arrives. Between two steps stands the product of the decays of the steps from after the earlier
one to the later one. A quotient of running products would overflow, and a difference of running
sums of logarithms is wrong by the rounding of large sums. So nothing is divided or subtracted: one
decay per head is summed up for each pair of steps, by a product with masks; for one decay per key
channel, where pairs of steps would be too many, a chunk is halved until each step stands alone.
Then any two steps are parted by the middle of exactly one block, and their decay is that from the
earlier step to this middle, which goes to the key, times that from there to the later step, which
goes to the query.

A step that starts anew is one whose decay is 0. In here heads come before steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._misc import over_rows
from ._parts import wide

CHUNK_SIZE = 64

# The logarithm of a decay to nothing. Finite, so that it times 0 is 0; sums of many are in the
# range of float32, and no exponential survives it.
LOG_ZERO = -1e30

_State = Float[Array, "heads key_size value_size"]


def decayed_step(
    state: _State,
    k: Float[Array, "#heads key_size"],
    v: Float[Array, "heads value_size"],
    decay: Float[Array, "heads #key_size"],
) -> _State:
    """The next state."""
    written = jnp.expand_dims(wide(k), 2) * jnp.expand_dims(wide(v), 1)
    return jnp.expand_dims(decay, 2) * state + written


def reads(
    q: Float[Array, "L #heads key_size"], states: Float[Array, "L heads key_size value_size"]
) -> Float[Array, "L heads value_size"]:
    """What the queries find in the states, step by step."""
    return jnp.einsum("lnk,lnkv->lnv", wide(q), states)


def _heads_first(*arrays: Float[Array, "T _ _"]) -> list[Float[Array, "_ T _"]]:
    return [jnp.moveaxis(wide(x), 1, 0) for x in arrays]


# --- one decay per head -----------------------------------------------------------------------


def summed_logs(
    log_decay: Float[Array, "T heads"], reset: Bool[Array, " T"] | None
) -> tuple[Float[Array, "heads T T"], Float[Array, "heads T"]]:
    """The logarithms of decays: from each step (second) to each later one (first), `LOG_ZERO` to
    earlier ones; and from the state that arrives to each step."""
    logs = jnp.maximum(wide(log_decay), LOG_ZERO)
    if reset is not None:
        logs = jnp.where(over_rows(reset, logs), LOG_ZERO, logs)
    upto = np.tri(len(logs), dtype=bool)
    after = np.tri(len(logs), k=-1)
    logs = logs.T
    with jax.default_matmul_precision("highest"):
        terms = jnp.expand_dims(after.astype(logs.dtype), 0) * jnp.expand_dims(logs, 2)
        between = jnp.einsum("tr,nrs->nts", upto.astype(logs.dtype), terms)
    arriving = between[:, :, 0] + logs[:, :1]
    return jnp.where(jnp.expand_dims(upto, 0), between, LOG_ZERO), arriving


def weighted_chunk(
    state: _State,
    q: Float[Array, "T #heads key_size"],
    k: Float[Array, "T #heads key_size"],
    v: Float[Array, "T heads value_size"],
    between: Float[Array, "#heads T T"],
    arriving: Float[Array, "#heads T"],
    scores: Float[Array, "heads T T"] | None = None,
) -> tuple[_State, Float[Array, "T heads value_size"]]:
    r"""The state after a chunk and what its queries read, with a weight for each pair of steps,

    $$y_t = w_t S^\top q_t + \sum_{s ≤ t} w_{ts} (q_t · k_s) v_s, \qquad
    S' = w_T S + \sum_s w_{Ts} k_s v_s^\top.$$

    **Arguments:**

    - `between`, `arriving`: the weights $w_{ts}$, zero for $s > t$, and $w_t$.
    - `scores`: the products $q_t · k_s$, if there is a faster way to them.
    """
    q, k, v = _heads_first(q, k, v)
    arriving = jnp.expand_dims(arriving, 2)
    with jax.default_matmul_precision("highest"):
        if scores is None:
            scores = jnp.einsum("ntk,nsk->nts", q, k)
        y = jnp.einsum("nts,nsv->ntv", scores * between, v)
        y = y + arriving * jnp.einsum("ntk,nkv->ntv", q, state)
        last = jnp.expand_dims(between[:, -1], 2)
        written = jnp.einsum("nsk,nsv->nkv", k, last * v)
    return arriving[:, -1:] * state + written, jnp.moveaxis(y, 0, 1)


def through_heads(
    state: _State,
    q: Float[Array, "T #heads key_size"],
    k: Float[Array, "T #heads key_size"],
    v: Float[Array, "T heads value_size"],
    log_decay: Float[Array, "T heads"],
    reset: Bool[Array, " T"] | None,
) -> tuple[_State, Float[Array, "T heads value_size"]]:
    """The state after a chunk and what its queries read, with one decay per head and step."""
    between, arriving = summed_logs(log_decay, reset)
    return weighted_chunk(state, q, k, v, jnp.exp(between), jnp.exp(arriving))


# --- one decay per key channel ----------------------------------------------------------------


def through_channels(
    state: _State,
    q: Float[Array, "T heads key_size"],
    k: Float[Array, "T heads key_size"],
    v: Float[Array, "T heads value_size"],
    decay: Float[Array, "T heads key_size"],
    reset: Bool[Array, " T"] | None,
) -> tuple[_State, Float[Array, "T heads value_size"]]:
    """The state after a chunk and what its queries read, with a decay per key channel and step."""
    length = len(q)
    if reset is not None:
        decay = jnp.where(over_rows(reset, decay), 0, decay)
    # To a power of two, by steps that keep the state as it is.
    surplus = ((0, (1 << (length - 1).bit_length()) - length), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, surplus) for x in (q, k, v))
    decay = jnp.pad(decay, surplus, constant_values=1)
    q, k, v, decay = _heads_first(q, k, v, decay)
    with jax.default_matmul_precision("highest"):
        between, upto, after = _halved(q, k, decay)
        y = jnp.einsum("nts,nsv->ntv", between, v) + jnp.einsum("ntk,nkv->ntv", q * upto, state)
        written = jnp.einsum("nsk,nsv->nkv", k * after, v)
    kept = jnp.expand_dims(upto[:, -1], 2) * state
    return kept + written, jnp.moveaxis(y, 0, 1)[:length]


def _halved(
    q: Float[Array, "heads T key_size"],
    k: Float[Array, "heads T key_size"],
    decay: Float[Array, "heads T key_size"],
) -> tuple[
    Float[Array, "heads T T"], Float[Array, "heads T key_size"], Float[Array, "heads T key_size"]
]:
    """The decayed products of queries and keys; and the decays up to and with each step, and those
    after each step. From blocks of one step to blocks of twice as many."""
    heads, length, size = q.shape
    between = jnp.sum(q * k, axis=2).reshape(heads, length, 1, 1)
    upto = jnp.expand_dims(decay, 2)
    after = jnp.ones_like(upto)
    half = 1
    while half < length:
        rows, square = (heads, -1, 2, half, size), (heads, -1, 2, half, half)
        upto, after, between = upto.reshape(rows), after.reshape(rows), between.reshape(square)
        late = q.reshape(rows)[:, :, 1] * upto[:, :, 1]
        early = k.reshape(rows)[:, :, 0] * after[:, :, 0]
        between = _with_corner(between, late, early)
        first, second = upto[:, :, 0], upto[:, :, 1]
        after = jnp.concatenate([after[:, :, 0] * second[:, :, -1:], after[:, :, 1]], axis=2)
        upto = jnp.concatenate([first, second * first[:, :, -1:]], axis=2)
        half *= 2
    rows = heads, length, size
    return between.reshape(heads, length, length), upto.reshape(rows), after.reshape(rows)


def _with_corner(
    between: Float[Array, "heads blocks 2 half half"],
    late: Float[Array, "heads blocks half key_size"],
    early: Float[Array, "heads blocks half key_size"],
) -> Float[Array, "heads blocks size size"]:
    """Two squares each on the diagonal of one, with the products of the later rows and the earlier
    ones below."""
    if late.shape[2] == 1:  # products of single rows are slow on a CPU
        corner = jnp.sum(late * early, axis=3, keepdims=True)
    else:
        corner = jnp.einsum("nbtk,nbsk->nbts", late, early)
    upper = jnp.concatenate([between[:, :, 0], jnp.zeros_like(corner)], axis=3)
    lower = jnp.concatenate([corner, between[:, :, 1]], axis=3)
    return jnp.concatenate([upper, lower], axis=2)
