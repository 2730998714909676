"""The interface of a cell, and the checks of its sizes and inputs."""

import abc
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._algebra import AbstractAlgebra
from ..structures import AbstractStructure


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
        to `xs[t]` and on nothing else, and must treat inputs before the first as zeros, as
        [`pararnn.cells.causal_convolution`][] does. With the default of 0, `project` works step by
        step."""
        return 0

    @property
    def input_struct(self) -> PyTree[jax.ShapeDtypeStruct] | None:
        """The shape and dtype of one input, for a cell with a `context`: with it, a layer can make
        past inputs of zeros before it sees any input ([`pararnn.RNN.init_state`][]). `None`, the
        default, leaves that to the inputs."""
        return None

    @property
    def sees_starts(self) -> bool:
        """True if the first step of a sequence is unlike the others. A layer then calls
        `project_with_starts` in place of `project`, and keeps beside the state whether there has
        been an input."""
        return False

    @abc.abstractmethod
    def init_state(self) -> PyTree[Array]:
        """The state before the first step: a pytree of floating-point or complex arrays."""

    @abc.abstractmethod
    def step(self, state: PyTree[Array], u: PyTree[Array]) -> PyTree[Array]:
        """The recurrence and nothing else: the next state from a state and one slice of `us`."""

    def project(self, xs: PyTree[Array]) -> PyTree[Array]:
        """From all inputs to the `us` that the steps consume. The identity by default."""
        return xs

    def project_with_starts(self, xs: PyTree[Array], starts: Bool[Array, " L"]) -> PyTree[Array]:
        """As `project`, for a cell that `sees_starts`: `starts` tells of each input whether a
        sequence begins with it, by a reset or because there was no input before. `project(xs)` is
        this with the first input alone."""
        raise NotImplementedError

    def readout(self, states: PyTree[Array], us: PyTree[Array]) -> PyTree[Array]:
        """From all states to all outputs, step by step. The identity by default."""
        return states


class AbstractChunkedCell(AbstractCell):
    """A cell that also makes a chunk of steps at once, faster than one after another.

        state ── apply_chunk(us[0:T]) ── state ── apply_chunk(us[T:2T]) ── state ...
                        │                                │
                    ys[0:T]                          ys[T:2T]

    - `chunk_size`: the most steps that `apply_chunk` is given.
    - `chunk_algebra`: the family of maps that chunks make of the state, if it is closed under
        composition; then accelerators make many chunks at once. For the elements see
        `chunk_factor`.
    """

    chunk_size: ClassVar[int] = 64
    chunk_algebra: ClassVar[AbstractAlgebra | None] = None

    @abc.abstractmethod
    def apply_chunk(
        self, state: PyTree[Array], us: PyTree[Array], reset: Bool[Array, " T"] | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The state after a chunk of steps and their outputs, `(state, ys)`, without the states
        between. `step` is the definition, which this must agree with.

        **Arguments:**

        - `state`: the one before the chunk.
        - `us`: what the steps consume; at most `chunk_size` of them.
        - `reset`: which steps start from `init_state()`, or `None` if none does.
        """

    def chunk_factor(self, us: PyTree[Array], reset: Bool[Array, " T"] | None) -> PyTree[Array]:
        """The linear part of a chunk's map from state to state, for the arguments of
        `apply_chunk`: the first part of an element of `chunk_algebra`, whose second part is the
        state after the chunk from `init_state()`. Only called if there is a `chunk_algebra`."""
        raise NotImplementedError


class AbstractShortConvCell(AbstractCell):
    """A cell whose `project` convolves over the last `conv_width` inputs, the present one included
    ([`pararnn.cells.causal_convolution`][]); with 0 it does not."""

    input_size: eqx.AbstractVar[int]
    conv_width: eqx.AbstractVar[int]

    @property
    def context(self) -> int:
        return max(self.conv_width - 1, 0)

    @property
    def input_struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.input_size,), jtu.tree_leaves(self)[0].dtype)


# --- checks -----------------------------------------------------------------------------------


def check_sizes(**sizes: Any) -> None:
    """Raises unless each of the named sizes is a positive Python int."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`{name}` must be a Python int; got {size!r}.")
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1; got {size}.")


def check_eps(norm_eps: Any) -> float:
    """Returns `norm_eps` as a float; raises unless it is a positive and finite number."""
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, (int, float)):
        raise TypeError(f"`norm_eps` must be a Python number; got {norm_eps!r}.")
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"`norm_eps` must be positive and finite; got {norm_eps}.")
    return float(norm_eps)


def head_sizes(num_heads: int, **sizes: int) -> list[int]:
    """The share of one head in each named size. Raises unless all are positive Python ints and
    `num_heads` divides each."""
    return _shares("num_heads", num_heads, sizes)


def block_sizes(num_blocks: int, **sizes: int) -> list[int]:
    """The share of one block on the diagonal of a map in each named size."""
    return _shares("num_blocks", num_blocks, sizes)


def _shares(whose: str, count: int, sizes: dict[str, int]) -> list[int]:
    check_sizes(**sizes, **{whose: count})
    for name, size in sizes.items():
        if size % count:
            raise ValueError(f"`{whose}` must divide `{name}`; got {count} for {size}.")
    return [size // count for size in sizes.values()]


def check_attention(
    input_size: int, num_heads: int, key_size: int, value_size: int, output_size: int | None
) -> int:
    """Raises unless all are positive Python ints; `None` stands for an `output_size` of
    `input_size`. Returns the output size."""
    output_size = input_size if output_size is None else output_size
    check_sizes(
        input_size=input_size,
        num_heads=num_heads,
        key_size=key_size,
        value_size=value_size,
        output_size=output_size,
    )
    return output_size


def check_inputs(xs: Any, input_size: int) -> None:
    """Raises unless `xs` is a sequence of feature vectors of the right size."""
    if not jtu.all_leaves([xs]):
        shapes = [str(jnp.shape(x)) for x in jtu.tree_leaves(xs)]
        shapes[3:] = ["…"] * (len(shapes) > 3)
        raise TypeError(
            f"`xs` must be one array of shape (L, input_size) = (L, {input_size}); got a "
            f"{type(xs).__name__} of arrays of shape {', '.join(shapes)}. Stack the inputs of the "
            "steps, `jnp.stack(xs)`, or join features, `jnp.concatenate(xs, -1)`."
        )
    if jnp.ndim(xs) != 2 or jnp.shape(xs)[1] != input_size:
        hint = ""
        if jnp.ndim(xs) == 3:
            hint = " For a batch of sequences use `jax.vmap`, as in `jax.vmap(rnn)(xs)`."
        raise ValueError(
            f"`xs` must have shape (L, input_size) = (L, {input_size}); got {jnp.shape(xs)}.{hint}"
        )
