"""Cells from vectors to vectors, and the updates that several of them share."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import AbstractCell
from ._parts import at_least_float32, zero_state

# A state, or a gate, of one step and of all steps.
Vector = Float[Array, " hidden_size"]
Vectors = Float[Array, "L hidden_size"]


class AbstractVectorCell(AbstractCell):
    """A cell from `input_size` features to a state of `hidden_size`. The state is one vector of at
    least float32 that starts at zero, unless the cell says otherwise."""

    weight_x: eqx.AbstractVar[Array]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def init_state(self) -> Any:
        return zero_state(self.hidden_size, self.weight_x)


def gru_update(
    h: Float[Array, " size"], us: Iterable[Array], hs: Iterable[Array], bias_n: Array | None
) -> Float[Array, " size"]:
    r"""The state after $r = σ(u_r + h_r)$, $z = σ(u_z + h_z)$, $n = \tanh(u_n + r ⊙ (h_n + b_n))$,
    $h' = n + z ⊙ (h - n)$.

    **Arguments:**

    - `h`: the state.
    - `us`, `hs`: what inputs and state add to $r$, $z$ and $n$.
    - `bias_n`: $b_n$; `None` is 0.
    """
    u_r, u_z, u_n = map(at_least_float32, us)
    h_r, h_z, h_n = hs
    r = jax.nn.sigmoid(u_r + h_r)
    z = jax.nn.sigmoid(u_z + h_z)
    n = jnp.tanh(u_n + r * (h_n if bias_n is None else h_n + at_least_float32(bias_n)))
    return n + z * (h - n)


def lstm_update(
    c: Float[Array, "*shape"], us: Iterable[Array], hs: Iterable[Array]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""$c' = σ(f) ⊙ c + σ(i) ⊙ \tanh(g)$ and $h' = σ(o) ⊙ \tanh(c')$, where each gate is the sum of
    what inputs (`us`) and state (`hs`) add to it, in the order $i, f, g, o$."""
    i, f, g, o = (at_least_float32(u) + h for u, h in zip(us, hs, strict=True))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)
