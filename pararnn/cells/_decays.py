"""How much of what each step of a chunk brings is left after each later step."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pieces(reset: Bool[Array, " T"] | None, length: int) -> Int[Array, " T"]:
    """The number of starts anew up to and with each step."""
    return jnp.zeros(length, int) if reset is None else jnp.cumsum(reset)


def decays(
    logs: Float[Array, " T"], piece: Int[Array, " T"]
) -> tuple[Float[Array, "T T"], Float[Array, " T"]]:
    """The products of the factors after step `s` up to step `t`, `[t, s]`; and of all up to step
    `t` since its piece began. Between pieces nothing passes. The factors are given by their
    logarithms, which are at most 0."""
    rows, columns = jnp.expand_dims(piece, 1), jnp.expand_dims(piece, 0)
    together = jnp.tril(rows == columns)
    # Sums of just the terms in question: a difference of two long sums would cancel.
    later = jnp.tril(jnp.broadcast_to(jnp.expand_dims(logs, 1), together.shape), -1)
    between = jnp.tril(jnp.ones(together.shape, logs.dtype)) @ later
    since = jnp.sum(jnp.where(together, jnp.expand_dims(logs, 0), 0), axis=1)
    return jnp.exp(jnp.where(together, between, -jnp.inf)), jnp.exp(since)
