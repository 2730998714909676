import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from .._misc import bool_where
from ._base import AbstractChunkedCell, check_attention, check_inputs
from ._decay import segment_log_decays
from ._parts import at_least_float32, init_linear, normal, project_out, split_heads, zero_state

_State = tuple[
    Float[Array, "... heads"], Float[Array, "... heads"], Float[Array, "... heads value_size"]
]
_Inputs = tuple[Float[Array, "... heads"], Float[Array, "... heads value_size"]]


def _merged(earlier: _State, later: _State) -> _State:
    """The sums over two sets of inputs, from those over each."""
    (m1, u1, w1), (m2, u2, w2) = earlier, later
    m = jnp.where(m2 > m1, m2, m1)
    a1, a2 = jnp.exp(m1 - m), jnp.exp(m2 - m)
    return m, u1 * a1 + u2 * a2, w1 * jnp.expand_dims(a1, 1) + w2 * jnp.expand_dims(a2, 1)


def _of_one(u: _Inputs) -> _State:
    """The sums over one input."""
    s, v = u
    return s, jnp.ones_like(s), v


@dataclasses.dataclass(frozen=True)
class AttentionAlgebra(AbstractAlgebra):
    r"""The maps that add more inputs to the sums of softmax attention, $(m, u, w)$:

    $$(m_1, u_1, w_1) ⊕ (m_2, u_2, w_2) = (m,\; u_1 e^{m_1 - m} + u_2 e^{m_2 - m},\;
    w_1 e^{m_1 - m} + w_2 e^{m_2 - m}), \qquad m = \max(m_1, m_2),$$

    in which no exponent is positive. An element is a flag and such a triple: where the flag is set,
    the map adds the triple to the state; otherwise it forgets the state and returns the triple.
    """

    def element(self, u: _Inputs) -> Any:
        """`u` is the pair of $s$, one number per head, and $v$."""
        return jnp.asarray(True), _of_one(u)

    def constant(self, state: _State) -> Any:
        return jnp.asarray(False), state

    def compose(self, later: Any, earlier: Any) -> Any:
        (keeps, sums), (keeps_earlier, _) = later, earlier
        return keeps & keeps_earlier, bool_where(keeps, _merged(earlier[1], sums), sums)

    def apply(self, element: Any, state: _State) -> _State:
        keeps, sums = element
        return bool_where(keeps, _merged(state, sums), sums)


class Aaren(AbstractChunkedCell):
    r"""Softmax attention with one learned query, as a recurrence (Feng et al., *Attention as an
    RNN*, 2024). Each output is the attention over all inputs up to its own. Per head, with
    $s_t = q^\top k_t / \sqrt{K}$, the state is the triple of the largest $s$ so far and the sums of
    $e^{s - m}$ and of $v\, e^{s - m}$:

    $$m' = \max(m, s), \qquad u' = u\, e^{m - m'} + e^{s - m'}, \qquad
    w' = w\, e^{m - m'} + v\, e^{s - m'}, \qquad y = w' / u'.$$

    $k$, of length $K$ = `key_size`, and $v$ are linear maps of $x$, and $q$ is a parameter. The
    output, of shape `(output_size,)`, is $W_o\, y$ with the $y$ of all heads in one vector. The
    state starts with $u = w = 0$ and an $m$ that is negative, large and finite.

    Steps compose exactly ([`pararnn.AttentionAlgebra`][]), so one associative scan solves it;
    chunks of steps are made by products of matrices. The Jacobian consists of a block for each
    head.
    """

    algebra: ClassVar[AbstractAlgebra | None] = AttentionAlgebra()
    chunk_algebra: ClassVar[AbstractAlgebra | None] = AttentionAlgebra()

    query: Float[Array, "num_heads key_size"]
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
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many queries there are.
        - `key_size`, `value_size`: the number of features of the keys and values of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, $q$ standard normal.
        """
        output_size = check_attention(input_size, num_heads, key_size, value_size, output_size)
        keys = jax.random.split(key, 4)
        self.query = normal(keys[0], (num_heads, key_size), 1.0, dtype)
        self.weight_k = init_linear(keys[1], num_heads * key_size, input_size, dtype)
        self.weight_v = init_linear(keys[2], num_heads * value_size, input_size, dtype)
        self.weight_o = init_linear(keys[3], output_size, num_heads * value_size, dtype)
        self.input_size = input_size
        self.num_heads = num_heads
        self.key_size = key_size
        self.value_size = value_size

    def init_state(self) -> _State:
        u = zero_state(self.num_heads, self.weight_k)
        w = zero_state((self.num_heads, self.value_size), self.weight_k)
        # So far from infinity that the difference of two such numbers is finite.
        return jnp.full_like(u, float(jnp.finfo(u.dtype).min) / 4), u, w

    def project(self, xs: Float[Array, "L input_size"]) -> _Inputs:
        """$s$ and $v$."""
        check_inputs(xs, self.input_size)
        k = at_least_float32(split_heads(xs @ self.weight_k.T, self.num_heads))
        s = jnp.einsum("nk,lnk->ln", at_least_float32(self.query), k) * self.key_size**-0.5
        return s, at_least_float32(split_heads(xs @ self.weight_v.T, self.num_heads))

    def step(self, state: _State, u: _Inputs) -> _State:
        return _merged(state, _of_one(u))

    def apply_chunk(
        self, state: _State, us: _Inputs, reset: Bool[Array, " L"] | None
    ) -> tuple[_State, Float[Array, "L output_size"]]:
        (before, u, w), (s, v) = state, us
        # Heads first: they are the batch of the product.
        s, v = s.T, jnp.moveaxis(v, 1, 0)
        between, arriving = segment_log_decays(jnp.zeros((s.shape[1], 1), s.dtype), reset)
        scores = between + jnp.expand_dims(s, 1)
        before = arriving + jnp.expand_dims(before, 1)
        m = jnp.maximum(jnp.max(scores, axis=2), before)
        weights, kept = jnp.exp(scores - jnp.expand_dims(m, 2)), jnp.exp(before - m)
        u = kept * jnp.expand_dims(u, 1) + jnp.sum(weights, axis=2)
        w = jnp.expand_dims(kept, 2) * jnp.expand_dims(w, 1) + weights @ v
        return (m[:, -1], u[:, -1], w[:, -1]), self._output(u.T, jnp.moveaxis(w, 1, 0))

    def chunk_factor(self, us: _Inputs, reset: Bool[Array, " L"] | None) -> Bool[Array, ""]:
        return jnp.asarray(True) if reset is None else ~jnp.any(reset)

    def readout(self, states: _State, us: _Inputs) -> Float[Array, "L output_size"]:
        _, u, w = states
        return self._output(u, w)

    def _output(
        self, u: Float[Array, "L heads"], w: Float[Array, "L heads value_size"]
    ) -> Float[Array, "L output_size"]:
        # Before the first step there is nothing to attend to.
        some = jnp.where(u > 0, u, jnp.ones_like(u))
        return project_out(w / jnp.expand_dims(some, 2), self.weight_o)
