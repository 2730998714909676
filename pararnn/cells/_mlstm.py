import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ._base import AbstractShortConvCell, block_sizes, check_inputs
from ._chunks_decayed import query_states, weighted_chunk
from ._decay import LOG_ZERO, init_forget_bias, log_gate, segment_log_decays, with_resets
from ._matrix import AbstractMatrixCell
from ._parts import (
    affine,
    append_ones,
    at_least_float32,
    init_convolution,
    init_linear,
    linear,
    norm_heads,
    normal,
    short_conv_silu,
    split_heads,
    zero_state,
)

_State = tuple[Float[Array, "num_heads key_size columns"], Float[Array, " num_heads"]]
_Element = tuple[Float[Array, " num_heads"], _State]

# Forgets all that was before, also next to another state that holds nothing.
_FORGET = 1e5 * LOG_ZERO
# The smallest denominator of an output is exp(-_SMALL): what is below is but rounding, in float64
# too, and the square of it is still in the range of float32.
_SMALL = 40


class _Inputs(NamedTuple):
    """The inputs of a step, or of several with a leading axis of time: $q$, $k$, $v$ with a last 1,
    which makes $n$, $\\tilde\\imath$, $\\log σ(\\tilde f)$, and the output gate or $c$."""

    query: Float[Array, "... num_heads key_size"]
    key: Float[Array, "... num_heads key_size"]
    value: Float[Array, "... num_heads columns"]
    log_input: Float[Array, "... num_heads"]
    log_forget: Float[Array, "... num_heads"]
    gate: Float[Array, "... features"]


def _mixed(
    logs: Float[Array, " num_heads"],
    memory: Float[Array, "num_heads key_size value_size"],
    new_logs: Float[Array, " num_heads"],
    new: Float[Array, "num_heads key_size value_size"],
) -> _State:
    """The mean of two means, given the logarithms of their weights, and that of the sum."""
    # Both shares by themselves: a large memory that is forgotten must not leave its rounding.
    kept, share = jax.nn.sigmoid(logs - new_logs), jax.nn.sigmoid(new_logs - logs)
    mean = jnp.expand_dims(kept, (1, 2)) * memory + jnp.expand_dims(share, (1, 2)) * new
    return mean, jnp.logaddexp(logs, new_logs)


@dataclasses.dataclass(frozen=True)
class _MeanAlgebra(AbstractAlgebra):
    r"""The maps that decay a mean's weight $e^\ell$ by $e^f$ and mix in another mean $M_1$ of
    weight $e^{\ell_1}$. An element is $(f, (M_1, \ell_1))$: of one step, the gates and
    $k v^\top$."""

    def element(self, u: _Inputs) -> _Element:
        return u.log_forget, (_written(u.key, u.value), u.log_input)

    def constant(self, state: _State) -> _Element:
        return jnp.full_like(state[1], _FORGET), state

    def compose(self, later: _Element, earlier: _Element) -> _Element:
        (f2, (memory2, logs2)), (f1, (memory1, logs1)) = later, earlier
        mixed = _mixed(logs1 + f2, memory1, logs2, memory2)
        return jnp.maximum(f1 + f2, _FORGET), mixed

    def apply(self, element: _Element, state: _State) -> _State:
        (f, (new, new_logs)), (memory, logs) = element, state
        return _mixed(logs + f, memory, new_logs, new)


def _written(k, v):
    return jnp.expand_dims(at_least_float32(k), 2) * jnp.expand_dims(at_least_float32(v), 1)


class MLSTM(AbstractMatrixCell, AbstractShortConvCell):
    r"""The mLSTM: an LSTM whose memory is a matrix, with an exponential input gate and a normaliser
    (Beck et al., *xLSTM: Extended long short-term memory*, 2024), in a smooth form. Per head, with
    the memory $C$ of shape `(key_size, value_size)` and $d$ the size of keys,

    $$\ell' = \log(e^{\ell + \log σ(\tilde f)} + e^{\tilde\imath}), \quad
    w = e^{\tilde\imath - \ell'},$$

    $$C' = (1-w)\, C + w\, k v^\top, \quad n' = (1-w)\, n + w\, k, \quad
    y = \frac{C'^\top q}{\max(|n' · q|, e^{-\ell'})},$$

    where $q$, $\sqrt{d}\,k$, $v$ are linear maps of $x$, and $\tilde\imath$ and $\tilde f$, one
    number per head, affine ones. The output, of shape `(output_size,)`, is

    $$W_o\, (σ(W_g x + b_g) ⊙ \mathrm{norm}(y)),$$

    where the norm takes the mean of each head from it and divides by the standard deviation, and
    $y$ then is that of all heads in one vector. The gates $\tilde\imath$ and $\tilde f$ are affine
    maps of $x$, as in the paper; in the authors' code (the package xlstm) they see $q$, $k$, $v$.

    The paper's state $(C, n, m)$, in which $m$ is a running maximum that keeps exponentials in
    range, gives the same $y$: its $C$ and $n$ are these times $e^{\ell - m}$. Here nothing needs a
    maximum, $C$ and $n$ are means of what was written, and the state has no kink. It is a pair of
    $C$, with $n$ as one more column, and $\ell$, which starts at $-10^{30}$, for $-∞$.

    The step is not affine in the state, but steps compose exactly, to a decay and one weighted mean
    of all that they write: one associative scan solves it. The Jacobian is block-diagonal over
    heads. A layer makes outputs chunk by chunk by products of matrices, without the states between.
    """

    algebra: ClassVar[AbstractAlgebra | None] = _MeanAlgebra()
    chunk_algebra: ClassVar[AbstractAlgebra | None] = _MeanAlgebra()

    weight_q: Float[Array, "num_heads*key_size input_size/num_blocks"]
    weight_k: Float[Array, "num_heads*key_size input_size/num_blocks"]
    weight_v: Float[Array, "num_heads*value_size input_size/num_blocks"]
    weight_i: Float[Array, "num_heads input_size"]
    weight_f: Float[Array, "num_heads input_size"]
    weight_g: Float[Array, "num_heads*value_size input_size"] | None
    # Left to the block around a cell that is `bare`.
    weight_o: Float[Array, "output_size num_heads*value_size"] | None
    weight_conv: Float[Array, "conv_width input_size"] | None
    weight_norm: Float[Array, "num_heads value_size"]
    bias_i: Float[Array, " num_heads"]
    bias_f: Float[Array, " num_heads"]
    bias_g: Float[Array, " num_heads*value_size"] | None
    skip: Float[Array, " input_size"] | None
    conv_width: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        output_size: int | None = None,
        *,
        conv_width: int = 0,
        num_blocks: int = 1,
        bare: bool = False,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `conv_width`: how many inputs a short convolution spans, the present one included. With
            0, there is none; else $q$ and $k$ are maps of SiLU of it in place of $x$.
        - `num_blocks`: into how many blocks on the diagonal the maps to $q$, $k$ and $v$ fall.
        - `bare`: whether gate and projection are left to a block around the cell. The output, of as
            many features as the input, then is $\mathrm{norm}(y) + D ⊙ c$ with $c$ what the maps
            to $q$ and $k$ see.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs, but 0 those to the gates $\tilde\imath$ and $\tilde f$, whose biases are
            normal with a standard deviation of 0.1, and evenly spaced from 3 to 6 over the heads;
            $b_g = 0$, and the norm's weights and $D$ are 1. The convolution is uniform in
            $\pm 1/\sqrt{n}$ with $n$ its width.
        """
        output_size = input_size if output_size is None else output_size
        keys = jax.random.split(key, 7)
        features = num_heads * value_size
        if bare and (features != input_size or output_size != input_size):
            raise ValueError(
                "With `bare`, `num_heads * value_size` and `output_size` must be `input_size`, "
                f"{input_size}; got {features} and {output_size}."
            )
        block_sizes(num_blocks, input_size=input_size, keys=num_heads * key_size, values=features)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, keys[:4], num_blocks=num_blocks)
        stored = self.weight_q.dtype
        self.weight_i = jnp.zeros((num_heads, input_size), stored)
        self.weight_f = jnp.zeros((num_heads, input_size), stored)
        self.weight_conv = init_convolution(keys[6], conv_width, input_size, dtype)
        self.weight_g = self.bias_g = self.skip = None
        if bare:
            self.weight_o = None  # pyright: ignore[reportIncompatibleVariableOverride]
            self.skip = jnp.ones(input_size, stored)
        else:
            self.weight_g = init_linear(keys[4], features, input_size, dtype)
            self.bias_g = jnp.zeros(features, stored)
        self.weight_norm = jnp.ones((num_heads, value_size), stored)
        self.bias_i = normal(keys[5], (num_heads,), 0.1, dtype)
        self.bias_f = init_forget_bias(num_heads, stored)
        self.conv_width = conv_width

    def init_state(self) -> _State:
        shape = self.num_heads, self.key_size, self.value_size + 1
        logs = jnp.full_like(zero_state(self.num_heads, self.weight_k), LOG_ZERO)
        return zero_state(shape, self.weight_k), logs

    def project(self, xs: Float[Array, "L input_size"]) -> _Inputs:
        check_inputs(xs, self.input_size)
        seen = short_conv_silu(self.weight_conv, xs)
        maps = [(self.weight_q, seen), (self.weight_k, seen), (self.weight_v, xs)]
        q, k, v = (split_heads(linear(weight, x), self.num_heads) for weight, x in maps)
        i = at_least_float32(affine(self.weight_i, self.bias_i, xs))
        f = log_gate(affine(self.weight_f, self.bias_f, xs))
        g = seen if self.weight_g is None else affine(self.weight_g, self.bias_g, xs)
        return _Inputs(q, k * self.key_size**-0.5, append_ones(v), i, f, g)

    def step(self, state: _State, u: _Inputs) -> _State:
        memory, logs = state
        return _mixed(logs + u.log_forget, memory, u.log_input, _written(u.key, u.value))

    def readout(self, states: Any, us: _Inputs) -> Float[Array, "L output_size"]:
        memories, logs = states
        return self._output(query_states(us.query, memories), logs, us)

    def apply_chunk(
        self, state: _State, us: _Inputs, reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        memory, logs = state
        between, arriving = segment_log_decays(us.log_forget, reset)
        between = between + jnp.expand_dims(us.log_input.T, 1)
        arriving = arriving + jnp.expand_dims(logs, 1)
        largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(between, axis=2), arriving))
        between = jnp.exp(between - jnp.expand_dims(largest, 2))
        arriving = jnp.exp(arriving - largest)
        total = jnp.sum(between, axis=2) + arriving
        logs = largest + jnp.log(total)
        weights = between / jnp.expand_dims(total, 2), arriving / total
        memory, y = weighted_chunk(memory, us.query, us.key, us.value, *weights)
        return (memory, logs[:, -1]), self._output(y, logs.T, us)

    def chunk_factor(
        self, us: _Inputs, reset: Bool[Array, " T"] | None
    ) -> Float[Array, " num_heads"]:
        return jnp.maximum(jnp.sum(with_resets(us.log_forget, reset), axis=0), _FORGET)

    def _output(
        self,
        y: Float[Array, "L num_heads columns"],
        logs: Float[Array, "L num_heads"],
        us: _Inputs,
    ) -> Float[Array, "L output_size"]:
        # Numerator and denominator times a power of e, so that none overflows.
        y = y * jnp.expand_dims(jnp.exp(jnp.minimum(logs, 0)), 2)
        least = jnp.expand_dims(jnp.exp(-jnp.clip(logs, 0, _SMALL)), 2)
        y = y[..., :-1] / jnp.maximum(jnp.abs(y[..., -1:]), least)
        y = norm_heads(y, self.weight_norm, centred=True)
        gate = at_least_float32(us.gate)
        if self.weight_o is None:
            assert self.skip is not None
            return y + jnp.expand_dims(at_least_float32(self.skip), 0) * gate
        return (jax.nn.sigmoid(gate) * y) @ at_least_float32(self.weight_o).T
