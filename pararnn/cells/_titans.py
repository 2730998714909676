"""A memory that learns while it is used: a small network, trained by the steps of a sequence."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._base import AbstractCell, AbstractChunkedCell, check_inputs, check_sizes
from ._decay import log_gate, segment_log_decays
from ._parts import at_least_float32, init_linear, l2_normalize

# The weights of the memory, `W_1` and `W_2`, or a sum of gradients, which is shaped like them.
_Memory = tuple[Float[Array, "memory_size key_size"], Float[Array, "value_size memory_size"]]
_State = tuple[_Memory, _Memory]
# The memory, the momentum, the memory as the chunk began, and how many of its steps are done.
_ChunkedState = tuple[_Memory, _Memory, _Memory, Float[Array, ""]]
# What the memory after some steps is made of, beside gradients: the memory and the momentum before
# them, and the initial memory, stacked.
_Old = tuple[Float[Array, "3 memory_size key_size"], Float[Array, "3 value_size memory_size"]]


class _Inputs(NamedTuple):
    r"""The inputs of a step, or of several with a leading axis of time: $q$, $k$, $v$, $\log η$,
    $\log(1 - α)$ and $λ$."""

    query: Float[Array, "... key_size"]
    key: Float[Array, "... key_size"]
    value: Float[Array, "... value_size"]
    log_momentum: Float[Array, "..."]
    log_kept: Float[Array, "..."]
    rate: Float[Array, "..."]


class Titans(AbstractCell):
    r"""A neural memory that learns at test time (Behrouz, Zhong, Mirrokni, *Titans: learning to
    memorize at test time*, 2024). The memory is a network with one hidden layer,

    $$M_θ(k) = W_2\, \mathrm{SiLU}(W_1 k), \qquad θ = (W_1, W_2),$$

    and each step is one of gradient descent, with momentum $S$ and decay, towards the association
    of its key with its value:

    $$S_t = η_t S_{t-1} - λ_t ∇_θ ℓ(θ_{t-1}; k_t, v_t), \qquad θ_t = (1 - α_t) θ_{t-1} + S_t,
    \qquad ℓ = \tfrac12 \lVert M_θ(k) - v \rVert^2.$$

    $q$, $k$, $v$ are linear maps of $x$, $q$ and $k$ divided by their norms; the gates are numbers,
    $η$ and $α$ of the form $σ(w x + b)$ and $λ$ that times `max_rate`. The output, of shape
    `(output_size,)`, is $W_o M_{θ_t}(q_t)$. The paper's short convolutions and the tokens that are
    always there belong around the cell.

    The state is $(θ, S)$. $θ_0$ is learned: `init_state()` returns parameters. Each gradient is
    taken at the present $θ$, so the step is not linear, and its Jacobian is dense, with
    `2 * memory_size * (key_size + value_size)` rows: too large for Newton's method unless all is
    tiny. Choose [`pararnn.Sequential`][], [`pararnn.Jacobi`][] or [`pararnn.QuasiNewton`][]; or the
    model of [`pararnn.TitansChunked`][], whose chunks are products of matrices.
    """

    weight_q: Float[Array, "key_size input_size"]
    weight_k: Float[Array, "key_size input_size"]
    weight_v: Float[Array, "value_size input_size"]
    weight_gates: Float[Array, "3 input_size"]
    bias_gates: Float[Array, " 3"]
    weight_o: Float[Array, "output_size value_size"]
    memory: _Memory
    input_size: int = eqx.field(static=True)
    max_rate: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        key_size: int,
        value_size: int,
        memory_size: int,
        output_size: int | None = None,
        *,
        max_rate: float = 0.1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: the number of features of inputs.
        - `key_size`, `value_size`: the numbers of inputs and outputs of the memory.
        - `memory_size`: the number of its hidden units.
        - `output_size`: the number of features of outputs; `None` is `input_size`.
        - `max_rate`: the largest rate $λ$ at which the memory learns.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: linear maps, those of the memory too, uniform in
            $\pm 1/\sqrt{n}$ with $n$ the number of their inputs; the biases of the gates, stacked
            in the order $η, λ, α$, are 0, 0 and -4: it forgets slowly.
        """
        output_size = input_size if output_size is None else output_size
        check_sizes(
            input_size=input_size,
            key_size=key_size,
            value_size=value_size,
            memory_size=memory_size,
            output_size=output_size,
        )
        if not 0 < max_rate < float("inf"):
            raise ValueError(f"`max_rate` must be positive and finite; got {max_rate}.")
        keys = jax.random.split(key, 7)
        self.weight_q = init_linear(keys[0], key_size, input_size, dtype)
        self.weight_k = init_linear(keys[1], key_size, input_size, dtype)
        self.weight_v = init_linear(keys[2], value_size, input_size, dtype)
        self.weight_gates = init_linear(keys[3], 3, input_size, dtype)
        self.bias_gates = jnp.array([0, 0, -4], self.weight_gates.dtype)
        self.weight_o = init_linear(keys[4], output_size, value_size, dtype)
        self.memory = (
            init_linear(keys[5], memory_size, key_size, dtype),
            init_linear(keys[6], value_size, memory_size, dtype),
        )
        self.input_size = input_size
        self.max_rate = float(max_rate)

    def init_state(self) -> _State:
        memory = jtu.tree_map(at_least_float32, self.memory)
        return memory, jtu.tree_map(jnp.zeros_like, memory)

    def project(self, xs: Float[Array, "L input_size"]) -> _Inputs:
        check_inputs(xs, self.input_size)
        q, k = (l2_normalize(xs @ weight.T) for weight in (self.weight_q, self.weight_k))
        v = at_least_float32(xs @ self.weight_v.T)
        raw = at_least_float32(xs @ self.weight_gates.T)
        momentum, rate, forget = (raw + jnp.expand_dims(at_least_float32(self.bias_gates), 0)).T
        rate = self.max_rate * jax.nn.sigmoid(rate)
        return _Inputs(q, k, v, log_gate(momentum), log_gate(-forget), rate)

    def step(self, state: _State, u: _Inputs) -> _State:
        memory, momentum = state
        return _learn(memory, momentum, memory, u)

    def readout(self, states: tuple[Any, Any], us: _Inputs) -> Float[Array, "L output_size"]:
        (first, second), _ = states
        hidden = jax.nn.silu(jnp.einsum("lhk,lk->lh", first, us.query))
        return self.output(jnp.einsum("lvh,lh->lv", second, hidden))

    def output(self, y: Float[Array, "L value_size"]) -> Float[Array, "L output_size"]:
        """From what the memory answers to outputs."""
        return y @ at_least_float32(self.weight_o).T


class TitansChunked(AbstractChunkedCell):
    r"""The memory of [`pararnn.Titans`][] in the form in which its paper trains it: the gradients
    of a chunk of steps are all taken at the memory $θ_c$ with which the chunk began,

    $$S_t = η_t S_{t-1} - λ_t ∇_θ ℓ(θ_c; k_t, v_t), \qquad θ_t = (1 - α_t) θ_{t-1} + S_t.$$

    This is another model, not a way to compute the same: with `chunk_length` 1 it is `Titans`.
    Within a chunk $θ$ and $S$ are linear in known gradients, each of which is an outer product; so
    without a solver named, a layer goes through a chunk at a time, by products of matrices, and
    keeps no state but those between chunks.

    The state is $(θ, S, θ_c, i)$, with $i$ the number of steps since the chunk began. A step that
    starts anew begins a chunk.
    """

    titans: Titans
    chunk_length: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        key_size: int,
        value_size: int,
        memory_size: int,
        output_size: int | None = None,
        *,
        chunk_length: int = 64,
        max_rate: float = 0.1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `chunk_length`: how many steps take their gradients at the same memory.
        - all others: as for [`pararnn.Titans`][].
        """
        check_sizes(chunk_length=chunk_length)
        self.titans = Titans(
            input_size,
            key_size,
            value_size,
            memory_size,
            output_size,
            max_rate=max_rate,
            dtype=dtype,
            key=key,
        )
        self.chunk_length = chunk_length

    @property
    def chunk_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        # The model's own chunks: a layer that starts anew goes from one beginning to the next.
        return self.chunk_length

    def init_state(self) -> _ChunkedState:
        memory, momentum = self.titans.init_state()
        return memory, momentum, memory, jnp.zeros((), memory[0].dtype)

    def project(self, xs: Float[Array, "L input_size"]) -> _Inputs:
        return self.titans.project(xs)

    def step(self, state: _ChunkedState, u: _Inputs) -> _ChunkedState:
        memory, momentum, begun, count = state
        begun = _where(count < 0.5, memory, begun)
        memory, momentum = _learn(memory, momentum, begun, u)
        # Compared between whole numbers, for a solver's guesses are none.
        count = jnp.where(count > self.chunk_length - 1.5, 0, count + 1).astype(count.dtype)
        return memory, momentum, begun, count

    def readout(self, states: Any, us: _Inputs) -> Float[Array, "L output_size"]:
        return self.titans.readout(states[:2], us)

    def apply_chunk(
        self, state: _ChunkedState, us: _Inputs, reset: Bool[Array, " T"] | None
    ) -> tuple[_ChunkedState, Float[Array, "T output_size"]]:
        """The gradients of these steps are taken at up to three memories: the one with which the
        model's own chunk began, the one reached where that ends, and, from the first step that
        starts anew, the initial one, after which no chunk ends.

            step       0 ......... boundary ......... reset ......... T
            gradients    at begun         at reached       at initial
        """
        memory, momentum, begun, count = state
        initial, _ = self.titans.init_state()
        q, k, v, log_momentum, log_kept, rate = us
        length, done = len(k), count.astype(int)
        flow = _flow(log_momentum, log_kept, rate, reset)
        old = jtu.tree_map(lambda *parts: jnp.stack(parts), memory, momentum, initial)

        errors = _errors(begun, k, v)
        boundary = (self.chunk_length - done) % self.chunk_length
        last = jnp.clip(boundary - 1, 0, length - 1)
        reached, _ = flow.state(last, old, k, errors)
        reached = _where(boundary == 0, memory, reached)
        beyond = jnp.arange(length) >= boundary
        errors = _where(beyond, _errors(reached, k, v), errors)
        begun = _where(beyond[-1], reached, begun)
        done = done + length
        if reset is not None:
            errors = _where(flow.anew, _errors(initial, k, v), errors)
            begun = _where(flow.anew[-1], initial, begun)
            done = jnp.where(flow.anew[-1], jnp.argmax(jnp.flip(reset)) + 1, done)

        y = flow.recall(old, q, k, errors)
        memory, momentum = flow.state(length - 1, old, k, errors)
        count = (done % self.chunk_length).astype(count.dtype)
        return (memory, momentum, begun, count), self.titans.output(y)


# --- learning ---------------------------------------------------------------------------------

# What the gradient consists of: `∇W_1` is the outer product of the first with the key, `∇W_2` that
# of the third with the second.
_Errors = tuple[
    Float[Array, "*axes memory_size"],
    Float[Array, "*axes memory_size"],
    Float[Array, "*axes value_size"],
]


def _errors(memory: _Memory, k: Array, v: Array) -> _Errors:
    """The gradient of half the squared error: that of the hidden units, what they are, and that of
    the answer; for keys and values along any axes."""
    first, second = memory
    raw = k @ first.T
    gate = jax.nn.sigmoid(raw)
    hidden = raw * gate
    error = hidden @ second.T - v
    return (error @ second) * gate * (1 + raw * (1 - gate)), hidden, error


def _learn(memory: _Memory, momentum: _Memory, at: _Memory, u: _Inputs) -> tuple[_Memory, _Memory]:
    """One step, with the gradient taken at some memory."""
    _, k, v, log_momentum, log_kept, rate = u
    of_hidden, hidden, of_answer = _errors(at, k, v)
    gradient = (jnp.outer(of_hidden, k), jnp.outer(of_answer, hidden))
    momentum = jtu.tree_map(lambda s, g: jnp.exp(log_momentum) * s - rate * g, momentum, gradient)
    return jtu.tree_map(lambda w, s: jnp.exp(log_kept) * w + s, memory, momentum), momentum


# --- many steps at once -----------------------------------------------------------------------


class _Flow(NamedTuple):
    """How much of what was there before some steps, and of each step's gradient, is in the memory
    and in the momentum after each of them.

    - `anew`: whether a start from the initial memory lies between.
    - `old`: how much of the memory, the momentum and the initial memory is in the memory.
    - `momentum`: how much of the old momentum is in the new one.
    - `learnt`, `moved`: how much of the gradient of each step (columns) is in the memory and in the
        momentum after each step (rows).
    """

    anew: Bool[Array, " T"]
    old: Float[Array, "3 T"]
    momentum: Float[Array, " T"]
    learnt: Float[Array, "T T"]
    moved: Float[Array, "T T"]

    def state(
        self, row: int | Int[Array, ""], old: _Old, k: Array, errors: _Errors
    ) -> tuple[_Memory, _Memory]:
        """The memory and the momentum after one of the steps."""
        of_hidden, hidden, of_answer = errors

        def sums(weights):
            weights = jnp.expand_dims(weights, 1)
            return (weights * of_hidden).T @ k, (weights * of_answer).T @ hidden

        memory = jtu.tree_map(
            lambda parts, new: jnp.einsum("p,pij->ij", self.old[:, row], parts) + new,
            old,
            sums(self.learnt[row]),
        )
        momentum = jtu.tree_map(
            lambda parts, new: self.momentum[row] * parts[1] + new, old, sums(self.moved[row])
        )
        return memory, momentum

    def recall(
        self, old: _Old, q: Array, k: Array, errors: _Errors
    ) -> Float[Array, "T value_size"]:
        """The answer of the memory after each step to the query of the step."""
        of_hidden, hidden, of_answer = errors

        def layer(matrices, x, keys, gradients):
            """The products with one matrix of all memories, none of which is formed."""
            weights = jnp.expand_dims(self.old, 2)
            known = sum(w * (x @ m.T) for w, m in zip(weights, matrices, strict=True))
            return known + ((x @ keys.T) * self.learnt) @ gradients

        first, second = old
        return layer(second, jax.nn.silu(layer(first, q, k, of_hidden)), hidden, of_answer)


def _flow(
    log_momentum: Float[Array, " T"],
    log_kept: Float[Array, " T"],
    rate: Float[Array, " T"],
    reset: Bool[Array, " T"] | None,
) -> _Flow:
    """From the gates of some steps."""
    anew = jnp.zeros(len(rate), bool) if reset is None else jnp.cumsum(reset) > 0
    kept, of_memory = _decays(log_kept, reset)
    moved, momentum = _decays(log_momentum, reset)
    moved = -jnp.expand_dims(rate, 0) * moved
    # A start anew writes the initial memory, and decays it at once.
    of_initial = jnp.zeros_like(rate)
    if reset is not None:
        of_initial = kept @ jnp.where(reset, jnp.exp(log_kept), 0)
    old = jnp.stack([of_memory, kept @ momentum, of_initial])
    return _Flow(anew, old, momentum, kept @ moved, moved)


def _decays(
    logs: Float[Array, " T"], reset: Bool[Array, " T"] | None
) -> tuple[Float[Array, "T T"], Float[Array, " T"]]:
    """From each step (second) to each later one (first), and from before the steps to each."""
    between, arriving = segment_log_decays(jnp.expand_dims(logs, 1), reset)
    return jnp.exp(between[0]), jnp.exp(arriving[0])


def _where(condition: Array, new: Any, old: Any) -> Any:
    """One of two trees, for all or for each step."""
    pad = lambda x: condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim))  # noqa: E731
    return jtu.tree_map(lambda a, b: jnp.where(pad(a), a, b), new, old)
