"""The choice between one device and several, made once per solve."""

from typing import Any

from jaxtyping import PyTree

from ._one_device import AxisName, OneDevice
from ._tracing import on_mesh
from .sharding._time import OnMesh, TimeShards


def choose_shards(tree: PyTree[Any], axis: AxisName | None = None) -> OneDevice:
    """The shards of a sequence along the manual `axis` of a mesh; without an axis, those of a
    sequence on one device, whose arrays in `tree` may lie on a mesh."""
    if axis is not None:
        return TimeShards(axis=axis)
    return OnMesh() if on_mesh(tree) else OneDevice()
