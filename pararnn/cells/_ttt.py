from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs
from ._delta_rule import AbstractDeltaCell, DeltaInputs
from ._matrix import AbstractMatrixCell
from ._parts import affine, at_least_float32, init_linear, l2_normalize, project_out


class TTTLinear(AbstractMatrixCell, AbstractDeltaCell):
    r"""Learning while reading, with a linear inner model (Sun et al., *Learning to (learn at test
    time): RNNs with expressive hidden states*, 2024). The state is a matrix $W$ of shape
    `(key_size, value_size)` per head, which learns to find the value $v$ from the key $k$: each
    step takes one step of gradient descent on $\frac12 \|W^\top k - v\|^2$ at a rate $η$, and then
    asks for what the query $q$ has,

    $$W' = W - η\, k (W^\top k - v)^\top, \qquad y = W'^\top q.$$

    $q$, $k$, $v$ are linear maps of $x$, $q$ and $k$ divided by their norms; the rate is
    $η = η_{max}\, σ(w_η x + b_η)$. The output, of shape `(output_size,)`, is $W_o\, y$ with the $y$
    of all heads in one vector. $W$ starts as $W_0$, which is learned.

    This is the delta rule of [`pararnn.DeltaNet`][], not gated, with $β = η$ and another start. As
    $k$ has unit length, no step overshoots while $η ≤ 1$, and none diverges while $η ≤ 2$. It is
    the exactly linear reading of the paper: a gradient step for each token, each at the state that
    the one before has left, where the paper takes those of several tokens at the state before all
    of them; and no layer norm in the inner model, which would make the step nonlinear. A residual
    connection in it would be the same with the identity added to $W_0$.

    What the state holds is $W - W_0$, so it starts at zero. The step is affine in it, so one pass
    solves it exactly. The Jacobian consists of `num_heads * value_size` blocks of
    `key_size × key_size`, the same for all columns of a head.
    """

    weight_rate: Float[Array, "num_heads input_size"]
    bias_rate: Float[Array, " num_heads"]
    weight_start: Float[Array, "num_heads key_size value_size"]
    max_rate: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        max_rate: float = 1.0,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many inner models there are.
        - `key_size`, `value_size`: the shape of the matrix of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `max_rate`: the largest rate of learning, $η_{max}$, in $(0, 2]$.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, $W_0$ too; $b_η = 0$.
        """
        if isinstance(max_rate, bool) or not isinstance(max_rate, (int, float)):
            raise TypeError(f"`max_rate` must be a Python number; got {max_rate!r}.")
        if not 0 < max_rate <= 2:
            raise ValueError(f"`max_rate` must be in (0, 2]: larger steps diverge; got {max_rate}.")
        keys = jax.random.split(key, 6)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, [*keys[:3], keys[5]])
        self.weight_rate = init_linear(keys[3], num_heads, input_size, dtype)
        self.bias_rate = jnp.zeros(num_heads, self.weight_q.dtype)
        start = init_linear(keys[4], num_heads * value_size, key_size, dtype)
        self.weight_start = start.reshape(num_heads, value_size, key_size).swapaxes(1, 2)
        self.max_rate = float(max_rate)

    def project(self, xs: Float[Array, "L input_size"]) -> DeltaInputs:
        """$q$, $k$, what $W_0$ leaves of $v$, and $η$."""
        check_inputs(xs, self.input_size)
        q, k, v = self._heads(xs)
        q, k = l2_normalize(q), l2_normalize(k)
        rate = self.max_rate * jax.nn.sigmoid(affine(self.weight_rate, self.bias_rate, xs))
        return DeltaInputs(q, [k], [at_least_float32(v) - self._at_start(k)], [rate], None)

    def _output(
        self, y: Float[Array, "L heads value_size"], us: DeltaInputs
    ) -> Float[Array, "L output_size"]:
        return project_out(y + self._at_start(us.query), self.weight_o)

    def _at_start(self, x: Float[Array, "L heads key_size"]) -> Float[Array, "L heads value_size"]:
        """The output of the inner model before it has learned."""
        return jnp.einsum("lnk,nkv->lnv", x, at_least_float32(self.weight_start))
