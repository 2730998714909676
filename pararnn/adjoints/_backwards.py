import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import flip_time
from .._recurrence import Recurrence


def backward_inputs(
    recurrence: Recurrence, states: PyTree[Array], cotangents: PyTree[Array]
) -> PyTree[Array]:
    """What the steps of the recurrence backwards in time consume: step t meets J[t+1], which is
    that of the state after step t and the next input. The first meets no Jacobian, as it starts
    from 0: any will do."""
    state_before_next = jtu.tree_map(
        lambda h, h0: jnp.concatenate([h[:-1], jnp.expand_dims(h0, 0)]), states, recurrence.init
    )
    next_xs = jtu.tree_map(lambda x: jnp.roll(x, -1, axis=0), recurrence.xs)
    return flip_time((state_before_next, next_xs, cotangents))
