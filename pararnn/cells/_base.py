"""The interface of a cell, and what its implementations share."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._algebra import AbstractAlgebra
from .._structure import AbstractStructure


class AbstractCell(eqx.Module):
    """A recurrence with its parameters. It knows nothing of how it will be solved.

    Only `init_state` and `step` are required. What does not depend on the state belongs into
    `project` and `readout`, which see all steps at once, where it costs one large product instead
    of many small ones.

    - `structure`: the structure of `∂step/∂state`, if you want to declare it. Left at `None`, it is
        detected.
    - `algebra`: the family of maps that the steps belong to, if it is closed under composition and
        not affine; then one associative scan solves the recurrence. Its `element` is given one
        slice of `us`. Affine steps are recognised without it.
    """

    structure: ClassVar[AbstractStructure | None] = None
    algebra: ClassVar[AbstractAlgebra | None] = None

    @property
    def context(self) -> int:
        """How many past inputs `project` looks at: `project(xs)[t]` may depend on `xs[t - context]`
        to `xs[t]` and on nothing else, and must treat inputs before the first as zeros. With the
        default of 0, `project` works step by step."""
        return 0

    @abc.abstractmethod
    def init_state(self) -> PyTree[Array]:
        """The state before the first step: a pytree of floating-point or complex arrays."""

    @abc.abstractmethod
    def step(self, state: PyTree[Array], u: PyTree[Array]) -> PyTree[Array]:
        """The recurrence and nothing else: the next state from a state and one slice of `us`."""

    def project(self, xs: PyTree[Array]) -> PyTree[Array]:
        """From all inputs to the `us` that the steps consume. The identity by default."""
        return xs

    def readout(self, states: PyTree[Array], us: PyTree[Array]) -> PyTree[Array]:
        """From all states to all outputs, step by step. The identity by default."""
        return states


# --- checks -----------------------------------------------------------------------------------


def check_sizes(**sizes: Any) -> None:
    """Raises unless each of the named sizes is a positive Python int."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`{name}` must be a Python int; got {size!r}.")
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1; got {size}.")


def check_heads(num_heads: int, **sizes: int) -> None:
    """Raises unless `num_heads` is a positive Python int that divides each of the named sizes."""
    check_sizes(num_heads=num_heads)
    for name, size in sizes.items():
        if size % num_heads:
            raise ValueError(f"`num_heads` must divide `{name}`; got {num_heads} for {size}.")


def check_inputs(xs: Any, input_size: int) -> None:
    """Raises unless `xs` is a sequence of feature vectors of the right size."""
    if jnp.ndim(xs) != 2 or jnp.shape(xs)[1] != input_size:
        hint = ""
        if jnp.ndim(xs) == 3:
            hint = " For a batch of sequences use `jax.vmap`, as in `jax.vmap(rnn)(xs)`."
        raise ValueError(
            f"`xs` must have shape (L, input_size) = (L, {input_size}); got {jnp.shape(xs)}.{hint}"
        )


# --- parameters and states --------------------------------------------------------------------


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], limit: float, dtype: Any
) -> Float[Array, "..."]:
    dtype = jnp.result_type(float) if dtype is None else dtype
    return jax.random.uniform(key, shape, dtype, minval=-limit, maxval=limit)


def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], scale: float, dtype: Any
) -> Float[Array, "..."]:
    dtype = jnp.result_type(float) if dtype is None else dtype
    return scale * jax.random.normal(key, shape, dtype)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same numbers in at least float32."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def zero_state(shape: int | tuple[int, ...], like: Array) -> Float[Array, "..."]:
    """A zero state of at least float32, whatever the dtype of the parameters."""
    return jnp.zeros(shape, wide(like).dtype)


# --- products ---------------------------------------------------------------------------------


def project_heads(
    weight: Float[Array, "gates heads outputs inputs"],
    bias: Float[Array, "gates heads*outputs"],
    xs: Float[Array, "L heads*inputs"],
) -> list[Float[Array, "L heads*outputs"]]:
    """`B x + b` for all steps, one array per gate, each `B` block-diagonal over heads."""
    _, num_heads, _, inputs = weight.shape
    heads = xs.reshape(len(xs), num_heads, inputs)
    # Gate by gate: one product for all gates would be transposed afterwards, at twice the time.
    products = [jnp.einsum("hij,lhj->lhi", gate, heads) for gate in weight]
    flat = [product.reshape(len(xs), bias.shape[1]) for product in products]
    return [u + b for u, b in zip(flat, jnp.expand_dims(bias, 1), strict=True)]


def recur_heads(
    weight: Float[Array, "rows head_size"], state: Float[Array, " size"]
) -> list[Float[Array, " size"]]:
    """`W h`, one array per gate, each `W` block-diagonal over heads.

    The rows of `weight` go over heads, then over gates, then over the units of a head. With one
    head that is the layout of Equinox. The heads are a batch axis of the product, in which
    structure detection sees the blocks.
    """
    rows, head_size = weight.shape
    gates = rows // len(state)
    if head_size == len(state):
        return jnp.split(weight @ state, gates)
    blocks = weight.reshape(-1, gates * head_size, head_size)
    products = jnp.einsum("hij,hj->hi", blocks, state.reshape(-1, head_size))
    products = products.reshape(-1, gates, head_size)
    return [products[:, gate].reshape(-1) for gate in range(gates)]
