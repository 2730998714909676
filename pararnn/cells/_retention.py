from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._base import check_eps, check_inputs, check_sizes
from ._chunks_decayed import AbstractDecayedCell, DecayedInputs, apply_heads, decayed_step
from ._decay import chunk_decay
from ._matrix import AbstractMatrixCell
from ._parts import gated_output, init_linear

_State = Float[Array, "num_heads key_size value_size"]


class Retention(AbstractMatrixCell, AbstractDecayedCell):
    r"""Linear attention that forgets at a fixed rate, while keys turn (Sun et al., *Retentive
    network: a successor to transformer for large language models*, 2023). Head $n$, from 0, has the
    state $S$ of shape `(key_size, value_size)`, and

    $$S' = γ_n R^\top S + k v^\top, \qquad y = S'^\top q / \sqrt{d}, \qquad γ_n = 1 - 2^{-5-n},$$

    where $q$, $k$, $v$ are linear maps of $x$, and $R$ turns the pairs $(u_i, u_{i + d/2})$ of the
    $d$ channels of a key, each by its own angle $θ_i = 10000^{-2i/d}$, to
    $(u_i \cos θ_i - u_{i + d/2} \sin θ_i, u_i \sin θ_i + u_{i + d/2} \cos θ_i)$. This is the
    rotation of queries and keys by their positions, $q_t^\top R^{\top (t-s)} k_s =
    (R^t q_t)^\top R^s k_s$: only differences of positions count, so none is kept. The output, of
    shape `(output_size,)`, is

    $$W_o\, (\mathrm{norm}(y) ⊙ \mathrm{SiLU}(W_g x)),$$

    where the norm takes the mean of each head from it and divides by the standard deviation, and
    $y$ then is that of all heads in one vector. The paper divides $y$ by the sum of the weights as
    well, which the norm undoes.

    The step is affine in the state: one pass solves it exactly. The Jacobian consists of blocks of
    2×2. A layer makes outputs chunk by chunk by products of matrices, without the states between.
    """

    weight_g: Float[Array, "num_heads*value_size input_size"]
    weight_norm: Float[Array, "num_heads value_size"]
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each; `key_size` is even.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `norm_eps`: is added to the variance of $y$ in the norm.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs; the norm's weights are 1.
        """
        check_sizes(key_size=key_size)
        if key_size % 2:
            raise ValueError(f"`key_size` must be even, as channels turn in pairs; got {key_size}.")
        keys = jax.random.split(key, 5)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, keys[:4])
        self.weight_g = init_linear(keys[4], num_heads * value_size, input_size, dtype)
        self.weight_norm = jnp.ones((num_heads, value_size), self.weight_q.dtype)
        self.norm_eps = check_eps(norm_eps)

    def project(self, xs: Float[Array, "L input_size"]) -> DecayedInputs:
        r"""$q/\sqrt{d}$, $k$, $v$ and the output gate $W_g x$."""
        check_inputs(xs, self.input_size)
        q, k, v = self._heads(xs)
        return DecayedInputs(self.key_size**-0.5 * q, k, v, rest=xs @ self.weight_g.T)

    def step(self, state: _State, u: DecayedInputs) -> _State:
        gamma = np.expand_dims(np.exp(self._log_decay()), 1)
        turned = self._turned_on(state, 1)
        return decayed_step(turned, u.key, u.value, jnp.asarray(gamma, state.dtype))

    def apply_chunk(
        self, state: _State, us: DecayedInputs, reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        # What turns is not the state but the queries, which follow it, and the keys: back, to where
        # they would have to be before the chunk.
        length = len(us.query)
        back = np.expand_dims(np.arange(1, length + 1), (1, 2)) * self._angles()
        q, k = _turned(us.query, back), _turned(us.key, back)
        state, y = apply_heads(state, q, k, us.value, self._log_decays(length, state), reset)
        return self._turned_on(state, length), self._output(y, us)

    def chunk_factor(
        self, us: DecayedInputs, reset: Bool[Array, " T"] | None
    ) -> Float[Array, "num_heads key_size key_size"]:
        length, start = len(us.query), self.init_state()
        one = jnp.expand_dims(jnp.eye(self.key_size, dtype=start.dtype), 0)
        return self._turned_on(chunk_decay(self._log_decays(length, start), reset) * one, length)

    def _output(
        self, y: Float[Array, "L num_heads value_size"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        weights = self.weight_norm, self.weight_o
        return gated_output(y, us.rest, *weights, centred=True, eps=self.norm_eps)

    def _turned_on(self, state, length):
        """By as much as that many steps turn a state."""
        return jnp.moveaxis(_turned(jnp.moveaxis(state, 1, 2), -length * self._angles()), 2, 1)

    def _log_decays(self, length, state):
        return jnp.asarray(np.tile(self._log_decay(), (length, 1)), state.dtype)

    def _log_decay(self) -> np.ndarray:
        return np.log1p(-(2.0 ** (-5 - np.arange(self.num_heads))))

    def _angles(self) -> np.ndarray:
        return 10000.0 ** (-2 * np.arange(self.key_size // 2) / self.key_size)


def _turned(x: Float[Array, "*axes size"], angle: np.ndarray) -> Float[Array, "*axes size"]:
    """The pairs of the last axis, each turned by its angle."""
    first, second = jnp.split(x, 2, axis=-1)
    angle = np.expand_dims(angle, tuple(range(x.ndim - np.ndim(angle))))
    cos, sin = jnp.asarray(np.cos(angle), x.dtype), jnp.asarray(np.sin(angle), x.dtype)
    return jnp.concatenate([cos * first - sin * second, sin * first + cos * second], axis=-1)
