from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ._base import AbstractCell, check_inputs
from ._chunk_maps import MatrixAlgebra
from ._chunks_decayed import CHUNK_SIZE, decayed_step, kept, reads, summed_logs, weighted_chunk
from ._parts import init_attention, merge_heads, split_heads, wide, with_ones, zero_state

_State = Float[Array, "num_heads features columns"]


class Based(AbstractCell):
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

    chunk_size: ClassVar[int | None] = CHUNK_SIZE
    chunk_algebra: ClassVar[AbstractAlgebra | None] = MatrixAlgebra()

    weight_q: Float[Array, "num_heads*key_size input_size"]
    weight_k: Float[Array, "num_heads*key_size input_size"]
    weight_v: Float[Array, "num_heads*value_size input_size"]
    weight_o: Float[Array, "output_size num_heads*value_size"]
    input_size: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)

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
        output_size = input_size if output_size is None else output_size
        keys = jax.random.split(key, 4)
        sizes = input_size, num_heads, key_size, value_size, output_size
        weights = init_attention(*sizes, dtype, keys)
        self.weight_q, self.weight_k, self.weight_v, self.weight_o = weights
        self.input_size = input_size
        self.num_heads = num_heads
        self.key_size = key_size
        self.value_size = value_size

    def init_state(self) -> _State:
        features = 1 + self.key_size + self.key_size**2
        return zero_state((self.num_heads, features, self.value_size + 1), self.weight_k)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$q$, $k$, and $v$ with a last 1, which makes $z$."""
        check_inputs(xs, self.input_size)
        maps = (self.weight_q, self.weight_k, self.weight_v)
        q, k, v = (split_heads(xs @ weight.T, self.num_heads) for weight in maps)
        scale = self.key_size**-0.25
        return [scale * q, scale * k, with_ones(v)]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        _, k, v = u
        one = jnp.ones((self.num_heads, 1), state.dtype)
        return decayed_step(state, _features(k), v, one)

    def readout(
        self,
        states: Float[Array, "L num_heads features columns"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L output_size"]:
        return self._outputs(reads(_features(us[0]), states))

    def apply_chunk(
        self, state: _State, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        q, k, v = us
        between, arriving = summed_logs(jnp.zeros((len(q), 1), state.dtype), reset)
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("tnk,snk->nts", wide(q), wide(k))
        scores = 1 + scores + scores**2 / 2
        weights = jnp.exp(between), jnp.exp(arriving)
        state, y = weighted_chunk(state, _features(q), _features(k), v, *weights, scores)
        return state, self._outputs(y)

    def chunk_factor(
        self, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> Float[Array, "#num_heads #key_size 1"]:
        return kept(jnp.zeros((len(us[0]), 1)), reset)

    def _outputs(self, y):
        return merge_heads(y[..., :-1] / y[..., -1:]) @ wide(self.weight_o).T


def _features(x: Float[Array, "*axes size"]) -> Float[Array, "*axes features"]:
    """$φ(x)$."""
    x = wide(x)
    pairs = jnp.expand_dims(x, -1) * jnp.expand_dims(x, -2)
    squares = pairs.reshape(*x.shape[:-1], -1) * 2**-0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], axis=-1)
