from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractCell, check_inputs, check_sizes, head_sizes
from ._parts import init_linear, project_gates, recur_heads, zero_state

_State = tuple[
    Float[Array, " hidden_size"], Float[Array, " hidden_size"], Float[Array, " hidden_size"]
]

# Stands for log(0). Finite, because a solver would take an infinite state for divergence; so low
# that no sum of log-gates comes near it, so that exp(_LOG_ZERO - ...) is an exact 0 in every dtype,
# and with it the derivative; within the range of float32 and bfloat16.
_LOG_ZERO = -1e30


class SLSTM(AbstractCell):
    r"""The sLSTM: an LSTM with an exponential input gate and a normaliser (Beck et al., *xLSTM:
    Extended long short-term memory*, 2024), in a smooth form:

    $$\ell' = \log(e^{\ell + \log σ(\tilde f)} + e^{\tilde\imath}), \quad
    w = e^{\tilde\imath - \ell'},$$

    $$v' = v + w ⊙ (\tanh\tilde z - v), \quad h' = σ(\tilde o) ⊙ v',$$

    where each raw gate is $W_x x + b + R h$ with $R$ block-diagonal over heads. The state is
    $(\ell, v, h)$, the output $h$, each of shape `(hidden_size,)`.

    The paper's state $(c, n, m)$, in which $m$ is a running maximum that keeps the exponentials in
    range, is the same recurrence: $v = c/n$ and $\ell = \log n + m$. Here nothing needs a maximum,
    so there is no kink and one state less, and $∂\ell'/∂\ell = ∂v'/∂v = 1-w$ lies in $[0, 1]$. The
    first step must find $n = 0$, that is $\ell = -∞$; the initial $\ell$ is $-10^{30}$, which gives
    the same numbers and derivatives.

    The Jacobian is dense, or block-diagonal over heads. Parameters are stacked in the order
    $i, f, z, o$; `weight_h` stacks first the heads and then, within each head, these four.
    """

    weight_x: Float[Array, "4*hidden_size input_size"]
    weight_h: Float[Array, "4*hidden_size hidden_size/num_heads"]
    bias: Float[Array, " 4*hidden_size"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_heads: int = 1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and outputs.
        - `num_heads`: into how many diagonal blocks each recurrent matrix falls; divides
            `hidden_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for $W_x$, uniform in $\pm 1/\sqrt{\text{input\_size}}$. As in the paper's code,
            $R = 0$, and $b = 0$ but for the forget gate, where unit $j$ of the $d$ units of a head
            has $5 - 12\,(j/(d-1))^{0.3}$.
        """
        check_sizes(input_size=input_size)
        (head_size,) = head_sizes(num_heads, hidden_size=hidden_size)
        self.weight_x = init_linear(key, 4 * hidden_size, input_size, dtype)
        self.weight_h = jnp.zeros((4 * hidden_size, head_size), self.weight_x.dtype)
        bias_f = 5 - 12 * jnp.linspace(0, 1, head_size, dtype=self.weight_x.dtype) ** 0.3
        bias_f = jnp.tile(bias_f, num_heads)
        zero = jnp.zeros_like(bias_f)
        self.bias = jnp.concatenate([zero, bias_f, zero, zero])
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> _State:
        zero = zero_state(self.hidden_size, self.weight_h)
        return jnp.full_like(zero, _LOG_ZERO), zero, zero

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L hidden_size"]]:
        check_inputs(xs, self.input_size)
        return project_gates(self.weight_x, self.bias, xs, 4)

    def step(self, state: _State, u: list[Float[Array, " hidden_size"]]) -> _State:
        ell, v, h = state
        i, f, z, o = (a + b for a, b in zip(u, recur_heads(self.weight_h, h), strict=True))
        kept = ell + jax.nn.log_sigmoid(f)
        ell = jnp.logaddexp(kept, i)
        w = jax.nn.sigmoid(i - kept)  # exp(i - ell), without the rounding of a large ell
        v = v + w * (jnp.tanh(z) - v)
        return ell, v, jax.nn.sigmoid(o) * v

    def readout(self, states: Any, us: Any) -> Float[Array, "L hidden_size"]:
        _, _, h = states
        return h
