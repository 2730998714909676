r"""Decayed outer products, step by step and chunk by chunk: per head,

$$S_t = \mathrm{diag}(a_t) S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t, \qquad 0 ≤ a_t ≤ 1.$$

A chunk is made by products of matrices: of its queries with its keys and values, and with the state
that arrives. Between two steps stands the product of the decays of the steps from after the earlier
one to the later one, as in `_decay.py`.

With one decay per head, that is a number for each pair of steps. With one per key channel, these
would be too many: a chunk is cut into blocks, which follow each other as chunks do, and a block is
halved until each step stands alone. Then any two steps of it are parted by the middle of exactly
one of its parts, and their decay is that from the earlier step to this middle, which goes to the
key, times that from there to the later step, which goes to the query. Of 8 steps, pairs meet at
level

    query 0  .
          1  0  .
          2  1  1  .
          3  1  1  0  .
          4  2  2  2  2  .
          5  2  2  2  2  0  .
          6  2  2  2  2  1  1  .
          7  2  2  2  2  1  1  0  .
        key  0  1  2  3  4  5  6  7

A step that starts anew is one whose decay is 0. In here heads come before steps.
"""

import abc
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._algebra import AbstractAlgebra
from ._base import AbstractChunkedCell
from ._chunk_maps import MatrixAlgebra
from ._decay import chunk_decay, segment_log_decays, with_resets
from ._parts import at_least_float32

# Where each key channel has its own decay. In larger blocks there is more to multiply, and of
# smaller ones more states between them.
_BLOCK_SIZE = 16

_State = Float[Array, "heads key_size value_size"]


class DecayedInputs(NamedTuple):
    """The inputs of a step, or of several with a leading axis of time.

    - `query`, `key`: of each head, or with an axis of 1, of all.
    - `value`: of each head.
    - `log_decay`: the logarithm of the decay, one per key channel or, with an axis of 1, per head;
        `None` is no decay.
    - `scale`: what the value of each head is written times; `None` is 1.
    - `rest`: what only the outputs take: a gate, or a path past the state.
    """

    query: Float[Array, "... #heads key_size"]
    key: Float[Array, "... #heads key_size"]
    value: Float[Array, "... heads value_size"]
    log_decay: Float[Array, "... heads #key_size"] | None = None
    scale: Float[Array, "... heads"] | None = None
    rest: PyTree[Array] = None

    @property
    def written(self) -> Float[Array, "... heads value_size"]:
        """The values that are written."""
        if self.scale is None:
            return self.value
        return jnp.expand_dims(self.scale, -1) * at_least_float32(self.value)

    @property
    def logs(self) -> Float[Array, "T #heads #key_size"]:
        """`log_decay`, or zeros."""
        if self.log_decay is None:
            return jnp.zeros((len(self.value), 1, 1), at_least_float32(self.value).dtype)
        return self.log_decay


class AbstractDecayedCell(AbstractChunkedCell):
    """A cell whose steps decay a matrix per head and add an outer product: its `project` returns
    what they consume, of type `DecayedInputs`. Chunks of steps are made by products of matrices."""

    chunk_algebra: ClassVar[AbstractAlgebra | None] = MatrixAlgebra()

    def step(self, state: _State, u: DecayedInputs) -> _State:
        decay = None if u.log_decay is None else jnp.exp(u.log_decay)
        return decayed_step(state, u.key, u.written, decay)

    def readout(
        self, states: Float[Array, "L num_heads key_size value_size"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        return self._output(query_states(us.query, states), us)

    def apply_chunk(
        self, state: _State, us: DecayedInputs, reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        arguments, logs = (state, us.query, us.key, us.written), us.logs
        if logs.shape[2] == 1:
            after, y = apply_heads(*arguments, logs[:, :, 0], reset)
        else:
            after, y = apply_channels(*arguments, logs, reset)
        return after, self._output(y, us)

    def chunk_factor(
        self, us: DecayedInputs, reset: Bool[Array, " T"] | None
    ) -> Float[Array, "#num_heads #key_size 1"]:
        return chunk_decay(us.logs, reset)

    @abc.abstractmethod
    def _output(
        self, y: Float[Array, "L num_heads value_size"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        """From what the queries read to outputs."""


# --- a step -----------------------------------------------------------------------------------


def decayed_step(
    state: _State,
    k: Float[Array, "#heads key_size"],
    v: Float[Array, "heads value_size"],
    decay: Float[Array, "#heads #key_size"] | None,
) -> _State:
    """The next state; a `decay` of `None` is 1."""
    written = jnp.expand_dims(at_least_float32(k), 2) * jnp.expand_dims(at_least_float32(v), 1)
    return state + written if decay is None else jnp.expand_dims(decay, 2) * state + written


def query_states(
    q: Float[Array, "L #heads key_size"], states: Float[Array, "L heads key_size value_size"]
) -> Float[Array, "L heads value_size"]:
    """The states read by the queries, step by step."""
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("lnk,lnkv->lnv", at_least_float32(q), states)


def _heads_first(*arrays: Float[Array, "T _ _"]) -> list[Float[Array, "_ T _"]]:
    return [jnp.moveaxis(at_least_float32(x), 1, 0) for x in arrays]


# --- one decay per head -----------------------------------------------------------------------


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


def apply_heads(
    state: _State,
    q: Float[Array, "T #heads key_size"],
    k: Float[Array, "T #heads key_size"],
    v: Float[Array, "T heads value_size"],
    log_decay: Float[Array, "T #heads"],
    reset: Bool[Array, " T"] | None,
) -> tuple[_State, Float[Array, "T heads value_size"]]:
    """The state after a chunk and what its queries read, with one decay per head and step."""
    between, arriving = segment_log_decays(log_decay, reset)
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
