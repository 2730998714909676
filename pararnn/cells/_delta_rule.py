r"""The delta rule, which several cells are made of: one step, and a chunk of steps at once.

Per head, with a state $S$ of shape `(key_size, value_size)`, a step decays it by $α$, then makes
one correction for each of its $n$ keys, of unit length, one after another:

$$S ← α S, \qquad S ← S + β k (v - S^\top k)^\top, \qquad y = S^\top q.$$

A chunk is made of rows, one per correction. With $D_{ts}$ the decay from row $s$ to row $t$ and
$G_t$ that from the state before the chunk, $S_{in}$, what row $t$ adds is $k_t u_t^\top$, and
$u_t = β_t (v_t - α_t S_{t-1}^\top k_t)$ depends on those before it, linearly:

$$u_t + β_t \sum_{s<t} D_{ts} (k_t^\top k_s) u_s = β_t (v_t - G_t S_{in}^\top k_t).$$

This triangular system is solved once per chunk. Then
$y_t = G_t S_{in}^\top q_t + \sum_{s≤t} D_{ts} (q_t^\top k_s) u_s$, and likewise for the state after
the chunk: all are products of matrices, the WY form of
Yang et al., *Parallelizing linear transformers with the delta rule over sequence length*, NeurIPS
2024. Its inverse has entries of at most 2, as corrections with β up to 2 lengthen nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._parts import wide

# A chunk has about as many rows: with more, products within it would outweigh those with the state.
ROWS = 64


class DeltaInputs(NamedTuple):
    """What steps consume, with a leading axis of time where it is that of several steps.

    - `query`: $q$ of each head.
    - `keys`, `values`, `betas`: $k$, $v$ and $β$ of each head, for each of the corrections.
    - `alpha`: the decay of each head; `None` is 1.
    """

    query: Float[Array, "... heads key_size"]
    keys: list[Float[Array, "... heads key_size"]]
    values: list[Float[Array, "... heads value_size"]]
    betas: list[Float[Array, "... heads"]]
    alpha: Float[Array, "... heads"] | None


def delta_step(
    state: Float[Array, "heads key_size value_size"], u: DeltaInputs
) -> Float[Array, "heads key_size value_size"]:
    """The next state."""
    if u.alpha is not None:
        state = jnp.expand_dims(u.alpha, (1, 2)) * state
    for k, v, beta in zip(u.keys, u.values, u.betas, strict=True):
        held = jnp.einsum("nk,nkv->nv", k, state)
        change = jnp.expand_dims(beta, 1) * (v - held)
        state = state + jnp.expand_dims(k, 2) * jnp.expand_dims(change, 1)
    return state


def delta_read(
    states: Float[Array, "L heads key_size value_size"], query: Float[Array, "L heads key_size"]
) -> Float[Array, "L heads value_size"]:
    """What the queries find in the states."""
    return jnp.einsum("lnk,lnkv->lnv", query, states)


def delta_chunk(
    state: Float[Array, "heads key_size value_size"],
    us: DeltaInputs,
    reset: Bool[Array, " L"] | None,
) -> tuple[Float[Array, "heads key_size value_size"], Float[Array, "L heads value_size"]]:
    """The state after a chunk, and what the queries find in the states of its steps."""
    count = len(us.keys)
    # Heads first: they are the batch of all products.
    query = jnp.moveaxis(us.query, 1, 0)
    keys, values = (_rows(x) for x in (us.keys, us.values))
    beta = jnp.expand_dims(_rows(us.betas), 2)
    decays = jnp.repeat(_decays(us.alpha, reset, us.query), count, axis=1)
    of_state, between = decays[:, :, :1], jnp.repeat(decays[:, :, 1:], count, axis=2)

    pairs = keys @ _transposed(keys)
    lower = jnp.tril(beta * between * pairs, -1)  # also within a step
    changes = _solved(lower, beta * (values - of_state * (keys @ state)))

    last = slice(count - 1, None, count)  # the last correction of each step is what is read
    weights = between[:, last] * (query @ _transposed(keys))
    ys = of_state[:, last] * (query @ state) + weights @ changes
    written = jnp.expand_dims(between[:, -1], 2) * keys
    after = of_state[:, -1:] * state + _transposed(written) @ changes
    return after, jnp.moveaxis(ys, 0, 1)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _rows(parts: list[Array]) -> Array:
    """One per correction, in order of time, behind the axis of heads."""
    stacked = jnp.stack([wide(x) for x in parts], axis=1)
    return jnp.moveaxis(stacked.reshape(-1, *stacked.shape[2:]), 1, 0)


# --- decays -----------------------------------------------------------------------------------


def _decays(
    alpha: Float[Array, "L heads"] | None,
    reset: Bool[Array, " L"] | None,
    query: Float[Array, "L heads key_size"],
) -> Float[Array, "heads L before"]:
    """To each step: from the state before the chunk, and from each step; 0 from later steps, and
    from what lies before a reset."""
    length, num_heads, _ = query.shape
    times, since = np.arange(length)[:, None], np.arange(-1, length)[None]
    anew = jnp.zeros(length, int) if reset is None else jnp.cumsum(reset)
    before = jnp.concatenate([jnp.zeros(1, anew.dtype), anew])
    seen = jnp.asarray(times >= since)
    seen &= jnp.expand_dims(anew, 1) == jnp.expand_dims(before, 0)
    seen = jnp.broadcast_to(seen, (num_heads, *seen.shape))
    if alpha is None:
        return seen.astype(query.dtype)
    # Each logarithm is a sum of its own, of terms of one sign: a difference of two sums from the
    # start of the chunk would lose what small decays have made large, and so would its derivative.
    log = jnp.expand_dims(jnp.log(jnp.maximum(alpha, jnp.finfo(alpha.dtype).tiny)).T, 2)
    terms = jnp.expand_dims(jnp.asarray(times > since, log.dtype), 0) * log
    until = jnp.broadcast_to(jnp.tri(length, dtype=log.dtype), (num_heads, length, length))
    sums = jnp.matmul(until, terms, precision="highest")
    # Chosen before exponentiation, in which nothing is positive.
    return jnp.exp(jnp.where(seen, sums, -jnp.inf))


# --- the triangular system --------------------------------------------------------------------


@jax.custom_jvp
def _solved(
    lower: Float[Array, "heads rows rows"], right: Float[Array, "heads rows size"]
) -> Float[Array, "heads rows size"]:
    """$(I + A)^{-1} b$ for a strictly lower triangular $A$."""
    return _inverse(lower) @ right


@_solved.defjvp
def _solved_jvp(primals, tangents):
    lower, right = primals
    d_lower, d_right = tangents
    inverse = _inverse(lower)
    solution = inverse @ right
    return solution, inverse @ (d_right - d_lower @ solution)


@jax.custom_jvp
def _inverse(lower: Float[Array, "heads rows rows"]) -> Float[Array, "heads rows rows"]:
    """$(I + A)^{-1}$ for a strictly lower triangular $A$, from blocks on its diagonal that double
    in size: that of $[[P, 0], [R, Q]]$ is $[[P^{-1}, 0], [-Q^{-1} R P^{-1}, Q^{-1}]]$. This is
    forward substitution, block by block; no powers of $A$, which may be large, are formed."""
    num_heads, rows, _ = lower.shape
    size = 1 << (rows - 1).bit_length()
    lower = jnp.pad(lower, ((0, 0), (0, size - rows), (0, size - rows)))
    inverses = jnp.ones((num_heads, size, 1, 1), lower.dtype)
    width = 1
    while width < size:
        inverses = _merged(inverses, lower)
        width *= 2
    return inverses[:, 0, :rows, :rows]


def _merged(inverses: Float[Array, "heads blocks width width"], lower: Array) -> Array:
    """The inverses of blocks twice as wide."""
    num_heads, blocks, width, _ = inverses.shape
    shape = (num_heads, blocks // 2, 2, width, blocks // 2, 2, width)
    # The lower left corner of each pair of blocks on the diagonal.
    corners = jnp.diagonal(lower.reshape(shape)[:, :, 1, :, :, 0], axis1=1, axis2=3)
    corners = jnp.moveaxis(corners, -1, 1)
    pairs = inverses.reshape(num_heads, blocks // 2, 2, width, width)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    corner = -(second @ (corners @ first))
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -(inverse @ tangents[0] @ inverse)
