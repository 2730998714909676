from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._base import AbstractCell, check_inputs, head_sizes
from ._parts import at_least_float32, inverse_softplus, normal, project_heads, zero_state

# c in the paper: a step with an open gate forgets as much as so many steps by exp(-softplus(Λ)).
_POWER = 8.0


class RGLRU(AbstractCell):
    r"""The real-gated linear recurrent unit (De et al., *Griffin: mixing gated linear recurrences
    with local attention for efficient language models*, 2024), real and diagonal:

    $$h_t = a_t ⊙ h_{t-1} + \sqrt{1 - a_t^2} ⊙ (i_t ⊙ x_t), \qquad
    \log a_t = -8\,\mathrm{softplus}(Λ) ⊙ r_t,$$

    with the recurrence gate $r_t = σ(W_r x_t + b_r)$ and the input gate $i_t = σ(W_i x_t + b_i)$,
    whose matrices are block-diagonal over `num_heads`. Both come from the input alone, hence the
    step is affine in the state, and one pass solves it exactly. The state never outgrows its
    inputs: the squares of the two factors add up to 1.

    The first input of a sequence is written as it is, $h_1 = a_1 ⊙ h_0 + i_1 ⊙ x_1$, as in the
    authors' code (google-deepmind/recurrentgemma), where the paper's formula has the root here,
    too. So the cell `sees_starts`: a layer keeps beside the state whether there has been an input,
    and `project` takes the first of its inputs for the first of a sequence.

    The Jacobian is diagonal. The state and the output have shape `(input_size,)`; the state has at
    least float32.
    """

    weight_x: Float[Array, "2 num_heads head_size head_size"]
    bias: Float[Array, "2 input_size"]
    decay: Float[Array, " input_size"]
    input_size: int = eqx.field(static=True)
    normalise_first: bool = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        *,
        num_heads: int = 1,
        normalise_first: bool = False,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs, states and outputs.
        - `num_heads`: the number of blocks of the gates' matrices.
        - `normalise_first`: whether the first input of a sequence has the factor $\sqrt{1 - a^2}$
            as all others have. If so, all steps are alike, and a layer keeps the state alone.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: $W \sim N(0, \text{num\_heads} / \text{input\_size})$, $b = 0$,
            and $Λ$ such that $\exp(-8\,\mathrm{softplus}(Λ))$, what is kept with an open gate, is
            uniform in $(0.9, 0.999)$, as in the paper. The authors' code draws
            $\exp(-\mathrm{softplus}(Λ))$ from this range, with uniform squares: there an open gate
            keeps from $0.43$ to $0.99$.
        """
        (size,) = head_sizes(num_heads, input_size=input_size)
        key_x, key_a = jax.random.split(key)
        self.weight_x = normal(key_x, (2, num_heads, size, size), size**-0.5, dtype)
        self.bias = jnp.zeros((2, input_size), self.weight_x.dtype)
        kept = jax.random.uniform(key_a, (input_size,), minval=0.9, maxval=0.999)
        self.decay = inverse_softplus(-jnp.log(kept) / _POWER).astype(self.bias.dtype)
        self.input_size = input_size
        self.normalise_first = normalise_first

    def init_state(self) -> Float[Array, " input_size"]:
        return zero_state(self.input_size, self.decay)

    @property
    def sees_starts(self) -> bool:
        return not self.normalise_first

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L input_size"]]:
        r"""$a$ and $\sqrt{1 - a^2} ⊙ (i ⊙ x)$, or $i ⊙ x$ where a sequence begins."""
        return self.project_with_starts(xs, jnp.arange(len(xs)) == 0)

    def project_with_starts(
        self, xs: Float[Array, "L input_size"], starts: Bool[Array, " L"]
    ) -> list[Float[Array, "L input_size"]]:
        check_inputs(xs, self.input_size)
        r, i = (
            jax.nn.sigmoid(at_least_float32(u)) for u in project_heads(self.weight_x, self.bias, xs)
        )
        rate = _POWER * jnp.expand_dims(jax.nn.softplus(at_least_float32(self.decay)), 0) * r
        gain = _complement(rate)
        if not self.normalise_first:
            gain = jnp.where(jnp.expand_dims(starts, 1), jnp.ones_like(gain), gain)
        return [jnp.exp(-rate), gain * i * at_least_float32(xs)]

    def step(
        self, state: Float[Array, " input_size"], u: list[Float[Array, " input_size"]]
    ) -> Float[Array, " input_size"]:
        a, written = u
        return a * state + written


def _complement(rate: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""$\sqrt{1 - a^2}$ for $a = e^{-\text{rate}}$, without cancellation near $a = 1$. At a rate of
    0 the slope would be infinite, and a closed gate, which has slope 0, make it NaN. So the rate is
    held above the root of the smallest number: the result is 0 to rounding there, and first and
    second derivatives are finite."""
    least = jnp.sqrt(jnp.finfo(rate.dtype).tiny)
    return jnp.sqrt(-jnp.expm1(-2 * jnp.maximum(rate, least)))
