from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ._base import AbstractCell, check_inputs, check_sizes
from ._chunk_maps import MatrixAlgebra
from ._chunks_decayed import CHUNK_SIZE, decayed_step, kept, reads, through_heads
from ._parts import init_linear, merge_heads, split_heads, wide, zero_state

_State = Float[Array, "num_heads key_size value_size"]


class PLSTM(AbstractCell):
    r"""A network of sources, transitions and marks along a sequence (Pöppel et al., *pLSTM:
    parallelizable linear source transition mark networks*, 2025). Per head, a memory $C$ of shape
    `(key_size, value_size)` lies between steps. A step reads the one that arrives through its mark
    $M$, and what it would write itself through $D$; then it passes on what is left after its
    transition $T$, with its source $S$:

    $$y_t = (M_t C_{t-1} + D_t k_t v_t^\top)^\top q_t, \qquad
    C_t = T_t C_{t-1} + S_t k_t v_t^\top.$$

    $q$, $k$, $v$ are linear maps of $x$, $q$ divided by the root of `key_size`; the four gates are
    one number for each head, $σ(W x + b)$. This is the form in one dimension, with numbers for
    transitions, which the paper has as matrices too. The output, of shape `(output_size,)`, is
    $W_o\, y$ with the $y$ of all heads in one vector. The block around it (a short convolution, a
    norm of each head's $y$, a path past the memory) is not part of the cell.

    The authors' code (ml-jku/plstm) gives the same numbers for the same gates, if its transitions
    are numbers. By default they are matrices, from eigenvalues $\tanh$ of affine maps; and the
    other gates do not see the input until asked to, and start nearly closed, at $σ(-5)$.

    As an output reads the memory before its step, that is the state: $C_{t-1}$ at step $t$, made
    of the one before by the gates of step $t-1$. So `project` looks at one past input. The step is
    affine in the state, so one pass solves it exactly; the Jacobian is diagonal. Without a solver
    named, a layer makes chunks of steps by products of matrices and keeps the states between chunks
    only. The state has at least float32.
    """

    chunk_size: ClassVar[int | None] = CHUNK_SIZE
    chunk_algebra: ClassVar[AbstractAlgebra | None] = MatrixAlgebra()

    weight_q: Float[Array, "num_heads*key_size input_size"]
    weight_k: Float[Array, "num_heads*key_size input_size"]
    weight_v: Float[Array, "num_heads*value_size input_size"]
    weight_gates: Float[Array, "4 num_heads input_size"]
    bias_gates: Float[Array, "4 num_heads"]
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
        - `num_heads`: how many matrices the state has.
        - `key_size`, `value_size`: the shape of each.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            their inputs; the biases of the gates, stacked in the order $S, T, M, D$, are 0, but
            those of $T$ go from 3 to 6 over the heads, which forget slowly.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(
            input_size=input_size,
            num_heads=num_heads,
            key_size=key_size,
            value_size=value_size,
            output_size=output_size,
        )
        keys = jax.random.split(key, 5)
        self.weight_q = init_linear(keys[0], num_heads * key_size, input_size, dtype)
        self.weight_k = init_linear(keys[1], num_heads * key_size, input_size, dtype)
        self.weight_v = init_linear(keys[2], num_heads * value_size, input_size, dtype)
        gates = init_linear(keys[3], 4 * num_heads, input_size, dtype)
        self.weight_gates = gates.reshape(4, num_heads, input_size)
        bias = jnp.zeros((4, num_heads), gates.dtype)
        self.bias_gates = bias.at[1].set(jnp.linspace(3, 6, num_heads, dtype=gates.dtype))
        self.weight_o = init_linear(keys[4], output_size, num_heads * value_size, dtype)
        self.input_size = input_size
        self.num_heads = num_heads
        self.key_size = key_size
        self.value_size = value_size

    @property
    def context(self) -> int:
        return 1

    @property
    def input_struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.input_size,), self.weight_q.dtype)

    def init_state(self) -> _State:
        return zero_state((self.num_heads, self.key_size, self.value_size), self.weight_k)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        r"""The source of the previous step, $S k$ and $v$, and its transition $\log T$; the mark of
        this one, $M q$; and its direct term, $D (q^\top k) v$."""
        check_inputs(xs, self.input_size)
        seen = jnp.pad(xs, ((1, 0), (0, 0)))
        k = wide(split_heads(seen @ self.weight_k.T, self.num_heads))
        v = wide(split_heads(seen @ self.weight_v.T, self.num_heads))
        source = jax.nn.sigmoid(self._gate(seen[:-1], 0))
        log_kept = jax.nn.log_sigmoid(self._gate(seen[:-1], 1))
        mark, direct = (jax.nn.sigmoid(self._gate(xs, index)) for index in (2, 3))
        q = wide(split_heads(xs @ self.weight_q.T, self.num_heads)) * self.key_size**-0.5
        own = direct * jnp.sum(q * k[1:], axis=-1, keepdims=True) * v[1:]
        return [source * k[:-1], v[:-1], log_kept, mark * q, own]

    def _gate(self, xs: Array, index: int) -> Float[Array, "L num_heads 1"]:
        raw = wide(xs @ self.weight_gates[index].T)
        raw = raw + jnp.expand_dims(wide(self.bias_gates[index]), 0)
        return jnp.expand_dims(raw, 2)

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        k, v, log_kept, _, _ = u
        return decayed_step(state, k, v, jnp.exp(log_kept))

    def readout(
        self,
        states: Float[Array, "L num_heads key_size value_size"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L output_size"]:
        *_, q, own = us
        return self._output(reads(q, states) + own)

    def apply_chunk(
        self, state: _State, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> tuple[_State, Float[Array, "T output_size"]]:
        k, v, log_kept, q, own = us
        after, y = through_heads(state, q, k, v, log_kept[:, :, 0], reset)
        return after, self._output(y + own)

    def chunk_factor(
        self, us: list[Float[Array, "T ..."]], reset: Bool[Array, " T"] | None
    ) -> Float[Array, "#num_heads #key_size 1"]:
        return kept(us[2][:, :, 0], reset)

    def _output(self, y: Float[Array, "L num_heads value_size"]) -> Float[Array, "L output_size"]:
        """From what is read to outputs."""
        return merge_heads(y) @ wide(self.weight_o).T
