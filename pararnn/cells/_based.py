from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._base import check_inputs
from ._chunks_decayed import (
    AbstractDecayedCell,
    DecayedInputs,
    decayed_step,
    query_states,
    weighted_chunk,
)
from ._decay import segment_log_decays
from ._matrix import AbstractMatrixCell
from ._parts import append_ones, at_least_float32, project_out, zero_state

_State = Float[Array, "num_heads features columns"]


class Based(AbstractMatrixCell, AbstractDecayedCell):
    r"""Linear attention by a Taylor series of the exponential (Arora et al., *Simple linear
    attention language models balance the recall-throughput tradeoff*, ICML 2024). Per head,

    $$S' = S + φ(k) v^\top, \quad z' = z + φ(k), \quad y = \frac{S'^\top φ(q)}{z' · φ(q)},
    \qquad φ(x) = [1, x, \mathrm{vec}(x x^\top)/\sqrt{2}],$$

    so that $φ(q) · φ(k) = 1 + q·k + (q·k)^2/2 ≥ 1/2$, nearly $\exp(q·k)$. $q$, $k$, $v$ are linear
    maps of $x$, $q$ and $k$ divided by the fourth root of the $d$ of `key_size`, so that $q·k$ is
    that of softmax attention. The state is $S$ with $z$ as one more column, of shape
    `(1 + d + d*d, value_size + 1)` per head. The output, of shape `(output_size,)`, is $W_o\, y$
    with the $y$ of all heads in one vector. The paper combines it with attention in a sliding
    window, which is not part of the cell.

    Nothing is forgotten, as in attention: the state grows with the length of the sequence. The step
    is a sum, and the Jacobian the identity: one pass solves it exactly. A layer makes outputs chunk
    by chunk by products of matrices, without the states between.
    """

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int = 16,
        value_size: int = 64,
        output_size: int | None = None,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`: the number of features of $q$ and $k$ of a head, before $φ$; the default is
            the paper's.
        - `value_size`: the number of features of $v$.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs.
        """
        keys = jax.random.split(key, 4)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, keys)

    def init_state(self) -> _State:
        features = 1 + self.key_size + self.key_size**2
        return zero_state((self.num_heads, features, self.value_size + 1), self.weight_k)

    def project(self, xs: Float[Array, "L input_size"]) -> DecayedInputs:
        """$q$, $k$, and $v$ with a last 1, which makes $z$."""
        check_inputs(xs, self.input_size)
        q, k, v = self._heads(xs)
        scale = self.key_size**-0.25
        return DecayedInputs(scale * q, scale * k, append_ones(v))

    def step(self, state: _State, u: DecayedInputs) -> _State:
        return decayed_step(state, _features(u.key), u.value, None)

    def readout(
        self, states: Float[Array, "L num_heads features columns"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        return self._output(query_states(_features(us.query), states), us)

    def apply_chunk(
        self, state: _State, us: DecayedInputs, reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        q, k = at_least_float32(us.query), at_least_float32(us.key)
        between, arriving = segment_log_decays(us.logs[:, :, 0], reset)
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("tnk,snk->nts", q, k)
        scores = 1 + scores + scores**2 / 2
        weights = jnp.exp(between), jnp.exp(arriving)
        state, y = weighted_chunk(state, _features(q), _features(k), us.value, *weights, scores)
        return state, self._output(y, us)

    def _output(
        self, y: Float[Array, "L num_heads columns"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        return project_out(y[..., :-1] / y[..., -1:], self.weight_o)


def _features(x: Float[Array, "*axes size"]) -> Float[Array, "*axes features"]:
    """$φ(x)$."""
    x = at_least_float32(x)
    pairs = jnp.expand_dims(x, -1) * jnp.expand_dims(x, -2)
    squares = pairs.reshape(*x.shape[:-1], -1) * 2**-0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], axis=-1)
