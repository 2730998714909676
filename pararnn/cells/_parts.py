"""Parts of cells: initial parameters, states, and the maps that `project` and `step` share.

All is written for one sequence. A map from inputs takes all of its steps at once, `(L, features)`,
and a stacked weight gives one array per gate.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from ._base import check_sizes, head_sizes

# --- dtypes and states ------------------------------------------------------------------------


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same numbers in at least float32."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def zero_state(shape: int | tuple[int, ...], like: Array) -> Float[Array, "..."]:
    """A zero state of at least float32, whatever the dtype of the parameters."""
    return jnp.zeros(shape, at_least_float32(like).dtype)


# --- initial parameters -----------------------------------------------------------------------


def default_dtype(dtype: Any) -> Any:
    """JAX's default for real numbers where none is given."""
    return jnp.result_type(float) if dtype is None else dtype


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], limit: float, dtype: Any
) -> Float[Array, "..."]:
    """Uniform in ± `limit`."""
    return jax.random.uniform(key, shape, default_dtype(dtype), minval=-limit, maxval=limit)


def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], scale: float, dtype: Any
) -> Float[Array, "..."]:
    """Normal with mean 0 and standard deviation `scale`."""
    return scale * jax.random.normal(key, shape, default_dtype(dtype))


def log_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], low: float, high: float
) -> Float[Array, "..."]:
    """Positive numbers whose logarithms are uniform, in JAX's default dtype: they are rates and
    time scales, of which functions are taken before they are stored."""
    log = jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high))
    return jnp.exp(log)


def inverse_softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The bias with which a gate of softplus starts at `x`, which is positive."""
    return x + jnp.log(-jnp.expm1(-x))


def init_linear(
    key: PRNGKeyArray, outputs: int, inputs: int, dtype: Any
) -> Float[Array, "outputs inputs"]:
    r"""A linear map, uniform in $\pm 1/\sqrt{\text{inputs}}$."""
    return uniform(key, (outputs, inputs), inputs**-0.5, dtype)


def init_gates(
    gates: int,
    input_size: int,
    hidden_size: int,
    num_heads: int,
    dtype: Any,
    keys: Iterable[PRNGKeyArray],
) -> tuple[
    Float[Array, "rows input_size"],
    Float[Array, "rows head_size"],
    Float[Array, " rows"],
]:
    r"""The weights of inputs, of the state (for `recur_heads`) and the biases of stacked gates, in
    `gates * hidden_size` rows; the sizes are checked. All are uniform in
    $\pm 1/\sqrt{\text{hidden\_size}}$, the weights of the state in
    $\pm 1/\sqrt{\text{hidden\_size} / \text{num\_heads}}$. Takes three keys."""
    check_sizes(input_size=input_size)
    (head_size,) = head_sizes(num_heads, hidden_size=hidden_size)
    key_x, key_h, key_b = keys
    rows, limit = gates * hidden_size, hidden_size**-0.5
    weight_x = uniform(key_x, (rows, input_size), limit, dtype)
    weight_h = uniform(key_h, (rows, head_size), head_size**-0.5, dtype)
    return weight_x, weight_h, uniform(key_b, (rows,), limit, dtype)


def init_vectors(
    key: PRNGKeyArray, count: int, hidden_size: int, dtype: Any
) -> Float[Array, "count hidden_size"]:
    r"""Vectors for recurrent weights as in the code of ParaRNN: with $D$ the hidden size,
    $N(0, (2/\sqrt{5D})^2)$."""
    return normal(key, (count, hidden_size), 2 / (5 * hidden_size) ** 0.5, dtype)


def init_diagonal_gates(
    gates: int,
    input_size: int,
    hidden_size: int,
    num_heads: int,
    dtype: Any,
    keys: Iterable[PRNGKeyArray],
) -> tuple[
    Float[Array, "gates num_heads outputs inputs"],
    Float[Array, "gates hidden_size"],
    Float[Array, "gates hidden_size"],
]:
    r"""The weights of inputs (for `project_heads`), the recurrent vectors and the biases of gates,
    as in the code of ParaRNN; the sizes are checked. With $D$ the hidden size and $e$ the inputs of
    a head, the first are uniform in $\pm\sqrt{6/(e+D)}$; the biases are 0, but those of the first
    gate are $-\mathrm{linspace}(0, 1, D)$. Takes two keys."""
    inputs, outputs = head_sizes(num_heads, input_size=input_size, hidden_size=hidden_size)
    key_x, key_h = keys
    limit = (6 / (inputs + hidden_size)) ** 0.5
    weight_x = uniform(key_x, (gates, num_heads, outputs, inputs), limit, dtype)
    weight_h = init_vectors(key_h, gates, hidden_size, dtype)
    first = -jnp.linspace(0, 1, hidden_size, dtype=weight_h.dtype)
    bias = jnp.stack([first] + [jnp.zeros_like(first)] * (gates - 1))
    return weight_x, weight_h, bias


# --- maps of all inputs -----------------------------------------------------------------------


def linear(
    weight: Float[Array, "outputs block"], xs: Float[Array, "L inputs"]
) -> Float[Array, "L outputs"]:
    """`W x` for all steps. With fewer columns than inputs, `weight` has the blocks on the diagonal
    of `W`, one below the other."""
    if weight.shape[1] == xs.shape[1]:
        return xs @ weight.T
    parts = split_heads(xs, xs.shape[1] // weight.shape[1])
    blocks = weight.reshape(parts.shape[1], -1, weight.shape[1])
    return merge_heads(jnp.einsum("bij,lbj->lbi", blocks, parts))


def affine(
    weight: Float[Array, "outputs block"],
    bias: Float[Array, " outputs"] | None,
    xs: Float[Array, "L inputs"],
) -> Float[Array, "L outputs"]:
    """`W x + b` for all steps, `W` as for `linear`; `None` is no bias."""
    ys = linear(weight, xs)
    return ys if bias is None else ys + jnp.expand_dims(bias, 0)


def project_gates(
    weight: Float[Array, "rows inputs"],
    bias: Float[Array, " rows"] | None,
    xs: Float[Array, "L inputs"],
    gates: int,
) -> list[Float[Array, "L size"]]:
    """`W x + b` for all steps, one array per gate, whose rows are stacked in `weight`."""
    # One array per gate: slicing a packed gate axis inside a scan is several times slower.
    return jnp.split(affine(weight, bias, xs), gates, axis=-1)


def project_heads(
    weight: Float[Array, "gates heads outputs inputs"],
    bias: Float[Array, "gates heads*outputs"],
    xs: Float[Array, "L heads*inputs"],
) -> list[Float[Array, "L heads*outputs"]]:
    """`B x + b` for all steps, one array per gate, each `B` block-diagonal over heads."""
    heads = split_heads(xs, weight.shape[1])
    # Gate by gate: one product for all gates would be transposed afterwards, at twice the time.
    products = [jnp.einsum("hij,lhj->lhi", gate, heads) for gate in weight]
    flat = [merge_heads(product) for product in products]
    return [u + b for u, b in zip(flat, jnp.expand_dims(bias, 1), strict=True)]


def causal_convolution(
    weight: Float[Array, "width channels"], xs: Float[Array, "L channels"]
) -> Float[Array, "L channels"]:
    r"""A short convolution along time, with a filter for each channel:

    $$y_t = \sum_{j=0}^{w-1} W_j ⊙ x_{t-w+1+j},$$

    where inputs before the first are 0. It belongs into the `project` of a cell, whose `context`
    then is $w - 1$.

    **Arguments:**

    - `weight`: the filters; `weight[-1]` meets the present input, `weight[0]` the oldest.
    - `xs`: one sequence; for a batch use `jax.vmap`.

    **Returns:**

    As many outputs as inputs, in their dtype; the sum is taken in at least float32.
    """
    if weight.ndim != 2 or xs.ndim != 2 or weight.shape[1] != xs.shape[1] or len(weight) < 1:
        raise ValueError(
            "`weight` must have shape (width, channels), with a width of at least 1, and `xs` "
            f"(L, channels); got {weight.shape} and {xs.shape}."
        )
    width, length = len(weight), len(xs)
    # A sum of shifted products: XLA's grouped convolutions are slow on a CPU.
    padded = at_least_float32(jnp.pad(xs, ((width - 1, 0), (0, 0))))
    taps = (
        jnp.expand_dims(at_least_float32(weight[j]), 0) * padded[j : j + length]
        for j in range(width)
    )
    return sum(taps, start=jnp.zeros(xs.shape, padded.dtype)).astype(xs.dtype)


def init_convolution(
    key: PRNGKeyArray, conv_width: int, channels: int, dtype: Any
) -> Float[Array, "conv_width channels"] | None:
    r"""The filters of a short convolution, uniform in $\pm 1/\sqrt{\text{conv\_width}}$; `None` if
    that is 0. The size is checked."""
    if conv_width == 0:
        return None
    check_sizes(conv_width=conv_width)
    return uniform(key, (conv_width, channels), conv_width**-0.5, dtype)


def short_conv_silu(
    weight: Float[Array, "conv_width channels"] | None,
    xs: Float[Array, "L channels"],
    bias: Float[Array, " channels"] | None = None,
) -> Float[Array, "L channels"]:
    """SiLU of the short convolution of `xs` plus the bias; `xs` itself if there are no filters."""
    if weight is None or len(weight) == 0:
        return xs
    ys = causal_convolution(weight, xs)
    return jax.nn.silu(ys if bias is None else ys + jnp.expand_dims(bias, 0))


# --- heads ------------------------------------------------------------------------------------


def split_heads(
    x: Inexact[Array, "*axes features"], num_heads: int
) -> Inexact[Array, "*axes heads size"]:
    """The last axis as heads of equal size; right for no steps, too."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Inexact[Array, "*axes heads size"]) -> Inexact[Array, "*axes heads*size"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def recur_heads(
    weight: Float[Array, "rows head_size"], state: Float[Array, " size"]
) -> list[Float[Array, " size"]]:
    """`W h`, one array per gate, each `W` block-diagonal over heads.

    The rows of `weight` go over heads, then over gates, then over the units of a head. With one
    head that is the layout of Equinox. The heads are a batch axis of the product, in which
    structure detection sees the blocks.
    """
    weight = at_least_float32(weight)
    rows, head_size = weight.shape
    gates = rows // len(state)
    if head_size == len(state):
        return jnp.split(weight @ state, gates)
    blocks = weight.reshape(-1, gates * head_size, head_size)
    products = jnp.einsum("hij,hj->hi", blocks, state.reshape(-1, head_size))
    products = products.reshape(-1, gates, head_size)
    return [products[:, gate].reshape(-1) for gate in range(gates)]


def l2_normalize(x: Float[Array, "*axes size"]) -> Float[Array, "*axes size"]:
    """`x` divided by its norm along the last axis, in at least float32; 0 stays 0, and it is smooth
    there."""
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


# --- outputs of heads -------------------------------------------------------------------------


def norm_heads(
    y: Float[Array, "L heads size"],
    weight: Float[Array, "heads size"],
    *,
    centred: bool,
    eps: float = 1e-5,
) -> Float[Array, "L heads*size"]:
    """Each head divided by the root of its mean square, after its mean is taken from it if it is to
    be `centred`, and times a weight per feature; then all heads as one vector."""
    if centred:
        y = y - jnp.mean(y, axis=2, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=2, keepdims=True) + eps)
    return merge_heads(y * jnp.expand_dims(at_least_float32(weight), 0))


def project_out(
    y: Float[Array, "L heads size"], weight: Float[Array, "outputs heads*size"]
) -> Float[Array, "L outputs"]:
    """`W y` with all heads as one vector, in at least float32."""
    return merge_heads(y) @ at_least_float32(weight).T


def gated_output(
    y: Float[Array, "L heads size"],
    gate: Float[Array, "L heads*size"],
    weight_norm: Float[Array, "heads size"],
    weight_o: Float[Array, "outputs heads*size"],
    *,
    centred: bool,
    eps: float,
) -> Float[Array, "L outputs"]:
    r"""$W_o\, (\mathrm{norm}(y) ⊙ \mathrm{SiLU}(g))$, with the norm of `norm_heads`, in at least
    float32."""
    y = norm_heads(y, weight_norm, centred=centred, eps=eps)
    return (y * jax.nn.silu(at_least_float32(gate))) @ at_least_float32(weight_o).T


def append_ones(v: Float[Array, "L heads size"]) -> Float[Array, "L heads columns"]:
    """Values with a last one of 1, under which keys are summed up."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
