"""Several recurrent layers: one after another, and in both directions."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._checks import brief, check_sequence, instance_hint
from .._misc import flip_time
from .._packing import segment_starts
from ..adjoints import AbstractAdjoint
from ..cells import AbstractCell
from ..solvers import AbstractSolver
from ._blocks import AbstractBlock
from ._rnn import RNN


class Stack(AbstractBlock):
    """Blocks, one after another; a block itself. Its state is the tuple of theirs."""

    blocks: tuple[AbstractBlock, ...]

    def __init__(self, blocks: Sequence[AbstractBlock]):
        """**Arguments:**

        - `blocks`: such as [`pararnn.ResidualBlock`][] and [`pararnn.MinMaxBlock`][].
        """
        if not isinstance(blocks, Sequence):
            raise TypeError(f"`blocks` must be a list or tuple of blocks; got {brief(blocks)}.")
        for i, block in enumerate(blocks):
            if not isinstance(block, AbstractBlock):
                raise TypeError(
                    f"`blocks[{i}]` must be a pararnn.AbstractBlock; got {brief(block)}."
                    f"{instance_hint(block) or _block_hint(block)}"
                )
        self.blocks = tuple(blocks)

    def _parts(self, state, key):
        """Each block with its state and its key."""
        count = len(self.blocks)
        states = (None,) * count if state is None else state
        if len(states) != count:
            raise ValueError(
                f"`state` must be a tuple of {count} states, one per block; got {state}."
            )
        keys = (None,) * count if key is None else jax.random.split(key, count)
        return zip(self.blocks, states, keys, strict=True)

    def init_state(
        self, x: Float[Array, " width"] | jax.ShapeDtypeStruct | None = None
    ) -> PyTree[Array]:
        return tuple(block.init_state(x) for block in self.blocks)

    def __call__(
        self,
        xs: Float[Array, "L width"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array | np.ndarray, " L"] | None = None,
        mask: Bool[Array | np.ndarray, " L"] | None = None,
        key: PRNGKeyArray | None = None,
        throw: bool = True,
    ) -> tuple[Float[Array, "L width"], PyTree[Array]]:
        check_sequence("stack", xs)
        new = []
        for block, old, block_key in self._parts(state, key):
            xs, final = block(xs, old, reset=reset, mask=mask, key=block_key, throw=throw)
            new.append(final)
        return xs, tuple(new)

    def step(
        self,
        x: Float[Array, " width"],
        state: PyTree[Array] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, " width"], PyTree[Array]]:
        new = []
        for block, old, block_key in self._parts(state, key):
            x, final = block.step(x, old, key=block_key)
            new.append(final)
        return x, tuple(new)


def _block_hint(value: object) -> str:
    if not isinstance(value, (RNN, AbstractCell, Bidirectional)):
        return ""
    return (
        " A block keeps the width: `pararnn.ResidualBlock(width, cell, key=key)` puts one around a "
        "cell. Layers without residuals are called one after another: `ys, final = rnn(xs)`."
    )


class Bidirectional(eqx.Module):
    """Two recurrent layers, one of which reads the sequence from its end.

    Each output has seen all of the sequence (of its piece, if there are resets), so there is no
    streaming form and no state to continue from.
    """

    forward: RNN[AbstractCell]
    backward: RNN[AbstractCell]

    def __init__(
        self,
        forward_cell: AbstractCell,
        backward_cell: AbstractCell,
        solver: AbstractSolver | None = None,
        *,
        adjoint: AbstractSolver | AbstractAdjoint | None = None,
        learn_init: bool = False,
    ):
        """**Arguments:**

        - `forward_cell`, `backward_cell`: the recurrences of the two directions.
        - `solver`, `adjoint`, `learn_init`: as for [`pararnn.RNN`][], for both.
        """
        self.forward, self.backward = (
            RNN(cell, solver, adjoint=adjoint, learn_init=learn_init)
            for cell in (forward_cell, backward_cell)
        )

    def __call__(
        self,
        xs: PyTree[Array],
        *,
        reset: Bool[Array | np.ndarray, " L"] | None = None,
        mask: Bool[Array | np.ndarray, " L"] | None = None,
        throw: bool = True,
    ) -> tuple[PyTree[Array], tuple[PyTree[Array], PyTree[Array]]]:
        """**Arguments:**

        - `xs`: the inputs, with a leading axis of length `L`.
        - `reset`: a boolean per step; where true, a new piece begins. No information passes between
            pieces, in neither direction.
        - `mask`, `throw`: as for [`pararnn.RNN`][].

        **Returns:**

        `(ys, (forward, backward))`: the outputs of both directions, joined along their last axis,
        and their final states: the forward one after the last step, the backward one after the
        first.
        """
        ys, final = self.forward(xs, reset=reset, mask=mask, throw=throw)
        if reset is not None:
            reset = segment_starts(jnp.flip(jnp.cumsum(jnp.asarray(reset))))
        mask = None if mask is None else jnp.flip(jnp.asarray(mask))
        flipped = flip_time(jtu.tree_map(jnp.asarray, xs))
        back, backward_final = self.backward(flipped, reset=reset, mask=mask, throw=throw)
        joined = jtu.tree_map(lambda a, b: jnp.concatenate([a, b], -1), ys, flip_time(back))
        return joined, (final, backward_final)
