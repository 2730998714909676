from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import check_inputs
from ._chunks_decayed import AbstractDecayedCell, DecayedInputs
from ._decay import init_forget_bias, log_gate
from ._matrix import AbstractMatrixCell
from ._parts import at_least_float32, init_linear, project_out, split_heads


class PLSTM(AbstractMatrixCell, AbstractDecayedCell):
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

    weight_gates: Float[Array, "4 num_heads input_size"]
    bias_gates: Float[Array, "4 num_heads"]

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
        keys = jax.random.split(key, 5)
        sizes = input_size, num_heads, key_size, value_size, output_size
        self._init_maps(sizes, dtype, [*keys[:3], keys[4]])
        gates = init_linear(keys[3], 4 * num_heads, input_size, dtype)
        self.weight_gates = gates.reshape(4, num_heads, input_size)
        bias = jnp.zeros((4, num_heads), gates.dtype)
        self.bias_gates = bias.at[1].set(init_forget_bias(num_heads, gates.dtype))

    @property
    def context(self) -> int:
        return 1

    @property
    def input_struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.input_size,), self.weight_q.dtype)

    def project(self, xs: Float[Array, "L input_size"]) -> DecayedInputs:
        r"""The mark of this step, $M q$, and its direct term, $D (q^\top k) v$; the source of the
        previous one, $S k$ and $v$, and its transition $\log T$."""
        check_inputs(xs, self.input_size)
        seen = jnp.pad(xs, ((1, 0), (0, 0)))
        maps = (self.weight_q, xs), (self.weight_k, seen), (self.weight_v, seen)
        q, k, v = (at_least_float32(split_heads(x @ w.T, self.num_heads)) for w, x in maps)
        q = q * self.key_size**-0.5
        source = jax.nn.sigmoid(self._gate(seen[:-1], 0))
        log_kept = log_gate(self._gate(seen[:-1], 1))
        mark, direct = (jax.nn.sigmoid(self._gate(xs, index)) for index in (2, 3))
        own = direct * jnp.sum(q * k[1:], axis=-1, keepdims=True) * v[1:]
        return DecayedInputs(mark * q, source * k[:-1], v[:-1], log_kept, rest=own)

    def _gate(self, xs: Array, index: int) -> Float[Array, "L num_heads 1"]:
        raw = at_least_float32(xs @ self.weight_gates[index].T)
        raw = raw + jnp.expand_dims(at_least_float32(self.bias_gates[index]), 0)
        return jnp.expand_dims(raw, 2)

    def _output(
        self, y: Float[Array, "L num_heads value_size"], us: DecayedInputs
    ) -> Float[Array, "L output_size"]:
        return project_out(y + us.rest, self.weight_o)
