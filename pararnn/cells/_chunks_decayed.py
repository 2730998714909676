r"""Decayed outer products, step by step and chunk by chunk: per head,

$$S_t = \mathrm{diag}(a_t) S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t, \qquad 0 ≤ a_t ≤ 1.$$

A chunk is made by products of matrices: of its queries with its keys and values, and with the state
that arrives. Between two steps stands the product of the decays of the steps from after the earlier
one to the later one. A quotient of running products would overflow, and a difference of running
sums of logarithms is wrong by the rounding of large sums. So nothing is divided or subtracted: the
logarithms are summed up where they count, by a product with masks, and all exponents are at most 0.

With one decay per head, that is a sum for each pair of steps. With one per key channel, these would
be too many: a chunk is cut into blocks, which follow each other as chunks do, and a block is halved
until each step stands alone. Then any two steps of it are parted by the middle of exactly one of
its parts, and their decay is that from the earlier step to this middle, which goes to the key,
times that from there to the later step, which goes to the query.

A step that starts anew is one whose decay is 0. In here heads come before steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._misc import over_rows
from ._parts import wide

CHUNK_SIZE = 64

# Where each key channel has its own decay. In larger blocks there is more to multiply, and of
# smaller ones more states between them.
_BLOCK_SIZE = 16

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
    """The states read by the queries, step by step."""
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("lnk,lnkv->lnv", wide(q), states)


def _heads_first(*arrays: Float[Array, "T _ _"]) -> list[Float[Array, "_ T _"]]:
    return [jnp.moveaxis(wide(x), 1, 0) for x in arrays]


def with_resets(
    log_decay: Float[Array, "T heads *channels"], reset: Bool[Array, " T"] | None
) -> Float[Array, "T heads *channels"]:
    """The logarithms of decays, finite; none stays of what is before a step that starts anew."""
    logs = jnp.maximum(wide(log_decay), LOG_ZERO)
    return logs if reset is None else jnp.where(over_rows(reset, logs), LOG_ZERO, logs)


def kept(
    log_decay: Float[Array, "T heads *channels"], reset: Bool[Array, " T"] | None
) -> Float[Array, "heads key_size 1"]:
    """How much of the state that arrives is left behind a chunk, row by row."""
    logs = jnp.sum(with_resets(log_decay, reset), axis=0)
    return jnp.exp(logs).reshape(len(logs), -1, 1)


# --- one decay per head -----------------------------------------------------------------------


def summed_logs(
    log_decay: Float[Array, "T heads"], reset: Bool[Array, " T"] | None
) -> tuple[Float[Array, "heads T T"], Float[Array, "heads T"]]:
    """The logarithms of decays: from each step (second) to each later one (first), `LOG_ZERO` to
    earlier ones; and from the state that arrives to each step."""
    logs = with_resets(log_decay, reset)
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


def apply_channels(
    state: _State,
    q: Float[Array, "T heads key_size"],
    k: Float[Array, "T heads key_size"],
    v: Float[Array, "T heads value_size"],
    log_decay: Float[Array, "T heads key_size"],
    reset: Bool[Array, " T"] | None,
) -> tuple[_State, Float[Array, "T heads value_size"]]:
    """The state after a chunk and what its queries read, with a decay per key channel and step."""
    length, heads, _ = q.shape
    # To blocks of a power of two, by steps that keep the state as it is.
    size = min(_BLOCK_SIZE, 1 << (length - 1).bit_length())
    surplus = ((0, -length % size), (0, 0), (0, 0))
    q, k, v, logs = (jnp.pad(x, surplus) for x in (q, k, v, with_resets(log_decay, reset)))
    count = len(q) // size
    q, k, v = (x.reshape(heads * count, size, -1) for x in _heads_first(q, k, v))
    with jax.default_matmul_precision("highest"):
        blocks = _through_blocks(q, k, v, _decays(logs, size))
        y, q, written, kept = (x.reshape(heads, count, *x.shape[1:]) for x in blocks)
        arriving = []
        for block in range(count):
            arriving.append(state)
            state = jnp.expand_dims(kept[:, block], 2) * state + written[:, block]
        y = y + jnp.einsum("nbtk,nbkv->nbtv", q, jnp.stack(arriving, axis=1))
    return state, jnp.moveaxis(y.reshape(heads, count * size, -1), 0, 1)[:length]


def _through_blocks(
    q: Float[Array, "blocks size key_size"],
    k: Float[Array, "blocks size key_size"],
    v: Float[Array, "blocks size value_size"],
    decays: Float[Array, "levels blocks size key_size"],
) -> tuple[
    Float[Array, "blocks size value_size"],
    Float[Array, "blocks size key_size"],
    Float[Array, "blocks key_size value_size"],
    Float[Array, "blocks key_size"],
]:
    """Blocks by themselves: what is read of what they write, the queries for what arrives, what is
    written, and how much is kept."""
    size = q.shape[1]
    levels, (upto, after) = decays[:-2], decays[-2:]
    # Of all queries with all keys, but those that count are few: on a CPU, to cut these out, to
    # multiply small matrices and to put them together takes longer.
    between = jnp.einsum("btk,bsk->bts", q, k) * jnp.expand_dims(jnp.eye(size, dtype=q.dtype), 0)
    late, early = jnp.expand_dims(q, 0) * levels, jnp.expand_dims(k, 0) * levels
    scores = jnp.einsum("lbtk,lbsk->lbts", late, early)
    between = between + jnp.sum(scores * jnp.asarray(_across(size), q.dtype), axis=0)
    y = jnp.einsum("bts,bsv->btv", between, v)
    return y, q * upto, jnp.einsum("bsk,bsv->bkv", k * after, v), upto[:, -1]


def _decays(
    logs: Float[Array, "T heads key_size"], size: int
) -> Float[Array, "levels blocks size key_size"]:
    """Between each step and a middle, in blocks of that size: as `_masks` says."""
    _, heads, channels = logs.shape
    masks = jnp.asarray(_masks(size), logs.dtype)
    steps = logs.reshape(-1, size, heads * channels)
    # A product for each block, or a CPU puts steps last.
    masks = jnp.broadcast_to(masks, (len(steps), *masks.shape))
    decays = jnp.exp(jnp.einsum("brs,bsk->brk", masks.reshape(len(steps), -1, size), steps))
    decays = decays.reshape(len(steps), -1, size, heads, channels)
    decays = jnp.transpose(decays, (1, 3, 0, 2, 4))
    return decays.reshape(len(decays), -1, size, channels)


def _masks(size: int) -> np.ndarray:
    """Which steps (third) stand between each step (second) and a middle. First of parts of 2, 4, …
    steps, of which each step is in one half, and then of the whole block: the steps up to and with
    each one, as if the middle were before the block, and those after it."""
    step = np.arange(size)
    upto = np.tri(size)
    levels = []
    for level in range(size.bit_length() - 1):
        half = step >> level
        same = np.expand_dims(half, 1) == np.expand_dims(half, 0)
        levels.append(same * np.where(np.expand_dims(half % 2 == 1, 1), upto, 1 - upto))
    return np.stack([*levels, upto, 1 - upto])


def _across(size: int) -> np.ndarray:
    """From which steps (last) of the first halves of parts of 2, 4, … steps to which (before) of
    the second ones, for each block."""
    step, level = np.arange(size), np.expand_dims(np.arange(size.bit_length() - 1), (1, 2, 3))
    later, earlier = np.expand_dims(step, 1) >> level, np.expand_dims(step, 0) >> level
    return (later == earlier + 1) & (later % 2 == 1)
