r"""The delta rule, which several cells are made of: one step, and a chunk of steps at once.

Per head, with a state $S$ of shape `(key_size, value_size)`, a step decays it by $α$, then makes
one correction for each of its $n$ keys, of unit length, one after another:

$$S ← α S, \qquad S ← S + β k (v - S^\top k)^\top, \qquad y = S^\top q.$$

A chunk is made of rows, one per correction; of three steps with two corrections each

    row    0    1    2    3    4    5
    step   0    0    1    1    2    2
    read        y0        y1        y2

With $D_{ts}$ the decay from row $s$ to row $t$ and
$G_t$ that from the state before the chunk, $S_{in}$, what row $t$ adds is $k_t u_t^\top$, and
$u_t = β_t (v_t - α_t S_{t-1}^\top k_t)$ depends on those before it, linearly:

$$u_t + β_t \sum_{s<t} D_{ts} (k_t^\top k_s) u_s = β_t (v_t - G_t S_{in}^\top k_t).$$

This triangular system is solved once per chunk. Then
$y_t = G_t S_{in}^\top q_t + \sum_{s≤t} D_{ts} (q_t^\top k_s) u_s$, and likewise for the state after
the chunk: all are products of matrices, the WY form of
Yang et al., *Parallelizing linear transformers with the delta rule over sequence length*, NeurIPS
2024. Its inverse has entries of at most 2, as corrections with β up to 2 lengthen nothing.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._algebra import AbstractAlgebra
from ._base import AbstractChunkedCell
from ._chunk_maps import MatrixAlgebra
from ._decay import segment_decays
from ._parts import at_least_float32, project_out, zero_state

# A chunk has about as many rows: with more, products within it would outweigh those with the state.
ROWS = 64
# Up to this size, calling for a product takes longer than to write it as a sum.
_SMALL = 4


class DeltaInputs(NamedTuple):
    """The inputs of a step, or of several with a leading axis of time.

    - `query`: $q$ of each head.
    - `keys`, `values`, `betas`: $k$, $v$ and $β$ of each head, for each of the corrections.
    - `alpha`: the decay of each head; `None` is 1.
    - `gate`: of the outputs, if they have one; steps take no notice of it.
    """

    query: Float[Array, "... heads key_size"]
    keys: list[Float[Array, "... heads key_size"]]
    values: list[Float[Array, "... heads value_size"]]
    betas: list[Float[Array, "... heads"]]
    alpha: Float[Array, "... heads"] | None
    gate: Float[Array, "... features"] | None = None


def delta_step(
    state: Float[Array, "heads key_size value_size"], u: DeltaInputs
) -> Float[Array, "heads key_size value_size"]:
    """The next state."""
    if u.alpha is not None:
        state = jnp.expand_dims(u.alpha, (1, 2)) * state
    for k, v, beta in zip(u.keys, u.values, u.betas, strict=True):
        held = jnp.einsum("nk,nkv->nv", k, state)
        change = jnp.expand_dims(at_least_float32(beta), 1) * (at_least_float32(v) - held)
        state = state + jnp.expand_dims(k, 2) * jnp.expand_dims(change, 1)
    return state


def delta_read(
    states: Float[Array, "L heads key_size value_size"], query: Float[Array, "L heads key_size"]
) -> Float[Array, "L heads value_size"]:
    """The states read by the queries."""
    return jnp.einsum("lnk,lnkv->lnv", query, states)


def delta_chunk(
    state: Float[Array, "heads key_size value_size"],
    us: DeltaInputs,
    reset: Bool[Array, " L"] | None,
) -> tuple[Float[Array, "heads key_size value_size"], Float[Array, "L heads value_size"]]:
    """The state after a chunk, and what the queries find in the states of its steps."""
    count = len(us.keys)
    # Heads first: they are the batch of all products.
    query = jnp.moveaxis(us.query, 1, 0)
    keys, values = (_rows(x) for x in (us.keys, us.values))
    beta = jnp.expand_dims(_rows(us.betas), 2)
    alpha = jnp.ones(us.query.shape[:2], us.query.dtype) if us.alpha is None else us.alpha
    between, of_state = segment_decays(alpha, reset)
    between = jnp.repeat(jnp.repeat(between, count, axis=1), count, axis=2)
    of_state = jnp.expand_dims(jnp.repeat(of_state, count, axis=1), 2)

    pairs = keys @ _transposed(keys)
    lower = jnp.tril(beta * between * pairs, -1)  # also within a step
    changes = _solved(lower, beta * (values - of_state * (keys @ state)))

    last = slice(count - 1, None, count)  # the last correction of each step is what is read
    weights = between[:, last] * (query @ _transposed(keys))
    ys = of_state[:, last] * (query @ state) + weights @ changes
    written = jnp.expand_dims(between[:, -1], 2) * keys
    after = of_state[:, -1:] * state + _transposed(written) @ changes
    return after, jnp.moveaxis(ys, 0, 1)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _rows(parts: list[Array]) -> Array:
    """One per correction, in order of time, behind the axis of heads."""
    stacked = jnp.stack([at_least_float32(x) for x in parts], axis=1)
    return jnp.moveaxis(stacked.reshape(-1, *stacked.shape[2:]), 1, 0)


# --- cells ----------------------------------------------------------------------------------


class AbstractDeltaCell(AbstractChunkedCell):
    """A cell whose steps are those of the delta rule: its `project` returns what they consume, of
    type `DeltaInputs`. Chunks of steps are made by products of matrices."""

    chunk_algebra: ClassVar[AbstractAlgebra | None] = MatrixAlgebra()

    weight_k: eqx.AbstractVar[Array]
    weight_o: eqx.AbstractVar[Array]
    num_heads: eqx.AbstractVar[int]
    key_size: eqx.AbstractVar[int]
    value_size: eqx.AbstractVar[int]

    def init_state(self) -> Float[Array, "num_heads key_size value_size"]:
        return zero_state((self.num_heads, self.key_size, self.value_size), self.weight_k)

    def step(
        self, state: Float[Array, "num_heads key_size value_size"], u: DeltaInputs
    ) -> Float[Array, "num_heads key_size value_size"]:
        return delta_step(state, u)

    def readout(
        self, states: Float[Array, "L num_heads key_size value_size"], us: DeltaInputs
    ) -> Float[Array, "L output_size"]:
        return self._output(delta_read(states, us.query), us)

    def apply_chunk(
        self,
        state: Float[Array, "num_heads key_size value_size"],
        us: DeltaInputs,
        reset: Bool[Array, " L"] | None,
    ) -> tuple[Float[Array, "num_heads key_size value_size"], Float[Array, "L output_size"]]:
        after, y = delta_chunk(state, us, reset)
        return after, self._output(y, us)

    def chunk_factor(
        self, us: DeltaInputs, reset: Bool[Array, " L"] | None
    ) -> Float[Array, "num_heads key_size key_size"]:
        # Of columns that nothing is written to, each unit vector becomes a column of the factor.
        size, dtype = self.key_size, self.init_state().dtype
        one = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (self.num_heads, size, size))
        nothing = [jnp.zeros_like(k) for k in us.keys]
        return delta_chunk(one, us._replace(values=nothing), reset)[0]

    def _output(
        self, y: Float[Array, "L num_heads value_size"], us: DeltaInputs
    ) -> Float[Array, "L output_size"]:
        """From what the queries find to outputs."""
        return project_out(y, self.weight_o)


# --- the triangular system --------------------------------------------------------------------


def _doubled(size: int) -> int:
    """The least power of two that is not below."""
    return 1 << (size - 1).bit_length()


def _halves(x: Float[Array, "heads blocks *axes"]) -> tuple[Array, Array]:
    """The first and the second of each two blocks."""
    x = x.reshape(x.shape[0], -1, 2, *x.shape[2:])
    return x[:, :, 0], x[:, :, 1]


@jax.custom_jvp
def _solved(
    lower: Float[Array, "heads rows rows"], right: Float[Array, "heads rows size"]
) -> Float[Array, "heads rows size"]:
    """$(I + A)^{-1} b$ for a strictly lower triangular $A$."""
    return _inverse(lower) @ right


@_solved.defjvp
def _solved_jvp(primals, tangents):
    lower, right = primals
    d_lower, d_right = tangents
    inverse = _inverse(lower)
    solution = inverse @ right
    return solution, inverse @ (d_right - d_lower @ solution)


@jax.custom_jvp
def _inverse(lower: Float[Array, "heads rows rows"]) -> Float[Array, "heads rows rows"]:
    """$(I + A)^{-1}$ for a strictly lower triangular $A$, from blocks on its diagonal that double
    in size: that of $[[P, 0], [R, Q]]$ is $[[P^{-1}, 0], [-Q^{-1} R P^{-1}, Q^{-1}]]$. This is
    forward substitution, block by block; no powers of $A$, which may be large, are formed."""
    num_heads, rows, _ = lower.shape
    size = _doubled(rows)
    lower = jnp.pad(lower, ((0, 0), (0, size - rows), (0, size - rows)))
    inverses = jnp.ones((num_heads, size, 1, 1), lower.dtype)
    while inverses.shape[1] > 1:
        inverses = _merged(inverses, lower)
    return inverses[:, 0, :rows, :rows]


def _merged(inverses: Float[Array, "heads blocks width width"], lower: Array) -> Array:
    """The inverses of blocks twice as wide."""
    num_heads, blocks, width, _ = inverses.shape
    shape = (num_heads, blocks // 2, 2, width, blocks // 2, 2, width)
    # The lower left corner of each pair of blocks on the diagonal.
    corners = jnp.diagonal(lower.reshape(shape)[:, :, 1, :, :, 0], axis1=1, axis2=3)
    corners = jnp.moveaxis(corners, -1, 1)
    first, second = _halves(inverses)
    corner = -_product(second, _product(corners, first))
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _product(x: Float[Array, "... width width"], y: Float[Array, "... width width"]) -> Array:
    if x.shape[-1] > _SMALL:
        return x @ y
    return jnp.sum(jnp.expand_dims(x, -1) * jnp.expand_dims(y, -3), axis=-2)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -(inverse @ tangents[0] @ inverse)
