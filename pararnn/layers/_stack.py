"""Several recurrent layers: one after another, and in both directions."""

from collections.abc import Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._checks import brief, instance_hint
from .._misc import flip_time
from .._packing import segment_starts
from ..cells import AbstractCell
from ._base import AbstractLayer, Flags
from ._blocks import check_rnn
from ._rnn import RNN


class Stack(AbstractLayer):
    """Layers, one after another; a layer itself. Its state is the tuple of theirs."""

    layers: tuple[AbstractLayer, ...]

    def __init__(self, layers: Sequence[AbstractLayer]):
        """**Arguments:**

        - `layers`: such as [`pararnn.RNN`][], [`pararnn.ResidualBlock`][] and
            [`pararnn.Bidirectional`][].
        """
        if not isinstance(layers, Sequence):
            raise TypeError(f"`layers` must be a list or tuple of layers; got {brief(layers)}.")
        for i, layer in enumerate(layers):
            if not isinstance(layer, AbstractLayer):
                hint = " Wrap the cell: `pararnn.RNN(cell)`."
                raise TypeError(
                    f"`layers[{i}]` must be a pararnn.AbstractLayer; got {brief(layer)}."
                    f"{hint if isinstance(layer, AbstractCell) else instance_hint(layer)}"
                )
        self.layers = tuple(layers)

    def _parts(self, state, key):
        """Each layer with its state and its key."""
        count = len(self.layers)
        states = (None,) * count if state is None else state
        if not isinstance(states, (tuple, list)) or len(states) != count:
            raise ValueError(
                f"`state` must be a tuple of {count} states, one per layer; got "
                f"{eqx.tree_pformat(state)}. (`step` takes the state before the input, "
                "`stack.step(state, x)`.)"
            )
        keys = (None,) * count if key is None else jax.random.split(key, count)
        return zip(self.layers, states, keys, strict=True)

    def init_state(self, x: PyTree[Any] | None = None) -> PyTree[Array]:
        states = []
        for layer in self.layers:
            states.append(layer.init_state(x))
            if x is not None and len(states) < len(self.layers):
                step = eqx.nn.inference_mode(layer).step
                x, _ = eqx.filter_eval_shape(step, states[-1], x)
        return tuple(states)

    def __call__(
        self,
        xs: PyTree[Any],
        state: PyTree[Array] | None = None,
        *,
        reset: Flags | None = None,
        mask: Flags | None = None,
        key: PRNGKeyArray | None = None,
        throw: bool = True,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        new = []
        for layer, old, layer_key in self._parts(state, key):
            xs, final = layer(xs, old, reset=reset, mask=mask, key=layer_key, throw=throw)
            new.append(final)
        return xs, tuple(new)

    def step(
        self, state: PyTree[Array] | None, x: PyTree[Any], *, key: PRNGKeyArray | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        new = []
        for layer, old, layer_key in self._parts(state, key):
            x, final = layer.step(old, x, key=layer_key)
            new.append(final)
        return x, tuple(new)


class Bidirectional(AbstractLayer):
    """Two recurrent layers, one of which reads the sequence from its end.

    Each output has seen all of the sequence (of its piece, if there are resets), so there is no
    streaming form and no state to continue from: `step`, `init_state` and a `state` raise a
    `ValueError`.
    """

    forward: RNN[AbstractCell]
    backward: RNN[AbstractCell]

    def __init__(self, forward: RNN[AbstractCell], backward: RNN[AbstractCell]):
        """**Arguments:**

        - `forward`, `backward`: the layers of the two directions.
        """
        check_rnn("forward", forward)
        check_rnn("backward", backward)
        self.forward, self.backward = forward, backward

    def init_state(self, x: PyTree[Any] | None = None) -> PyTree[Array]:
        _refuse_state()

    def __call__(
        self,
        xs: PyTree[Any],
        state: None = None,
        *,
        reset: Flags | None = None,
        mask: Flags | None = None,
        key: PRNGKeyArray | None = None,
        throw: bool = True,
    ) -> tuple[PyTree[Array], tuple[PyTree[Array], PyTree[Array]]]:
        """Apply the layer to a whole sequence.

        **Arguments:**

        - `xs`: the inputs, with a leading axis of length `L`.
        - `state`: `None`.
        - `reset`: a boolean per step; where true, a new piece begins. No information passes between
            pieces, in neither direction.
        - `mask`, `throw`: as for calling an [`pararnn.RNN`][].
        - `key`: ignored, as there is no dropout; for the interface of all layers.

        **Returns:**

        `(ys, (forward, backward))`: the outputs of both directions, concatenated along their last
        axis, and their final states: the forward one after the last step, the backward one after
        the first.
        """
        if state is not None:
            _refuse_state()
        ys, final = self.forward(xs, reset=reset, mask=mask, throw=throw)
        if reset is not None:
            reset = segment_starts(jnp.flip(jnp.cumsum(jnp.asarray(reset))))
        mask = None if mask is None else jnp.flip(jnp.asarray(mask))
        flipped = flip_time(jtu.tree_map(jnp.asarray, xs))
        back, backward_final = self.backward(flipped, reset=reset, mask=mask, throw=throw)
        joined = jtu.tree_map(lambda a, b: jnp.concatenate([a, b], -1), ys, flip_time(back))
        return joined, (final, backward_final)

    def step(
        self, state: PyTree[Array] | None, x: PyTree[Any], *, key: PRNGKeyArray | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        _refuse_state()


def _refuse_state() -> NoReturn:
    raise ValueError(
        "A bidirectional layer has seen all of the sequence before its first output, so it has no "
        "`step` and no `state` to continue from; call it with all of `xs`."
    )
