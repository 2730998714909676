"""The interface of a layer."""

import abc
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

Flags = Bool[Array | np.ndarray, " L"]


class AbstractLayer(eqx.Module):
    """A recurrent network from sequence to sequence, which [`pararnn.Stack`][] composes.

    One sequence at a time, without a batch axis: use `jax.vmap(layer)` for batches.
    """

    @abc.abstractmethod
    def init_state(self, x: PyTree[Any] | None = None) -> PyTree[Array]:
        """The `state` with which a sequence begins; `x` as for [`pararnn.RNN.init_state`][]."""

    @abc.abstractmethod
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
        """Apply the layer to a whole sequence.

        **Arguments:**

        - `xs`: the inputs, with a leading axis of length `L`.
        - `state`: where to continue, as returned by the call or the step before; `None`, or
            `init_state()`, starts anew.
        - `reset`, `mask`, `throw`: as for calling an [`pararnn.RNN`][]; the outputs of padding are
            zero.
        - `key`: for dropout. `None` only without dropout or in inference mode
            ([`equinox.nn.inference_mode`][]).

        **Returns:**

        `(ys, state)`.
        """

    @abc.abstractmethod
    def step(
        self, state: PyTree[Array] | None, x: PyTree[Any], *, key: PRNGKeyArray | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The streaming form: one step, with the numbers of the parallel call (but for dropout).

        **Arguments:**

        - `state`: as returned by the step, or the call, before; `None`, or `init_state()`, starts
            anew.
        - `x`: one time slice of the inputs.
        - `key`: for dropout.

        **Returns:**

        `(y, state)`.
        """
