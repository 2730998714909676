"""A layer whose sequence is sharded along time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._checks import check_xs, to_arrays
from .._misc import num_steps
from .._one_device import AxisName, OneDevice
from .._select import time_axis
from .._shards import choose_shards
from ..sharding._mesh import TimeAxis, both, is_manual, over_devices
from ..sharding._placement import mesh_context


def sharded_axis(layer: Any, xs: PyTree[Any]) -> TimeAxis | None:
    """The mesh axis over which a call of an `RNN` is to be mapped; `None` if it runs here."""
    xs = to_arrays("xs", xs)
    check_xs(xs)
    if num_steps(xs) == 0:
        return None
    time = time_axis(layer.solver, layer.adjoint, (xs, layer))
    return None if time is None or time.mesh is None else time


def named_axis(layer: Any) -> AxisName | None:
    """The mesh axis that the solver or the adjoint of an `RNN` names."""
    policies = (layer.solver, layer.adjoint)
    return next((p.axis for p in policies if p is not None and p.axis is not None), None)


def shards_of(layer: Any) -> OneDevice:
    """The devices that share a sequence with this one, inside `map_over_shards`."""
    axis = named_axis(layer)
    return choose_shards(layer, axis if axis is not None and is_manual(axis) else None)


def map_over_shards(
    layer: Any, time: TimeAxis, call: Callable[..., tuple[Any, Any]], xs, state, reset, mask
) -> tuple[Any, Any]:
    """`call(layer, xs, state, reset=..., mask=...)` on each device, with its part of the
    sequence."""
    # The arrays are an argument: closed over, they would have types that do not fit the mesh.
    arrays, static = eqx.partition(layer, eqx.is_array)

    def on_shard(sharded, replicated, real):
        (xs, reset, mask), (arrays, state) = sharded, replicated
        return call(eqx.combine(arrays, static), xs, state, reset=reset, mask=both(mask, real))

    sharded, replicated = (to_arrays("xs", xs), reset, mask), (arrays, state)
    with mesh_context((sharded, replicated)):
        return over_devices(time, on_shard, sharded, replicated)
