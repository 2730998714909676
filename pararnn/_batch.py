"""The size of the batch around a solve.

What is best for one sequence is not for sixty, and code under `jax.vmap` is written for one. But a
function with a batching rule of its own is told how large the batch is.
"""

import threading
from typing import Any

import jax
import jax.core
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


class _Seen(threading.local):
    batch = 1


_seen = _Seen()


@jax.custom_batching.custom_vmap
def _probe(leaves: list[Array]) -> list[Array]:
    return []


@_probe.def_vmap
def _probe_batched(axis_size, in_batched, leaves):
    if isinstance(axis_size, int):  # not one that an export leaves open
        _seen.batch *= axis_size
    _probe(leaves)  # there may be a batch around this one
    return [], []


def batch_size(tree: PyTree[Any]) -> int:
    """The product of the sizes of all `jax.vmap`s around the caller that batch an array of `tree`,
    as far as they can be seen while it is traced: what is traced on its own, as the body of a scan
    or a `jax.jit` inside the `jax.vmap`, does not see what is outside. 1 if there is none.

    Only a hint: what depends on it may change how a result is computed, never the result.
    """
    traced = [x for x in jtu.tree_leaves(tree) if isinstance(x, jax.core.Tracer)]
    _seen.batch = 1
    if traced:
        _probe(jax.lax.stop_gradient(traced))  # no derivative of it will be asked for
    return _seen.batch
