"""The choice between one device and several, made once per solve."""

from typing import Any

from jaxtyping import PyTree

from ._one_device import AxisName, OneDevice
from ._tracing import on_mesh
from .sharding._time import TimeShards


def choose_shards(tree: PyTree[Any], axis: AxisName | None = None) -> OneDevice:
    """The shards of a sequence along the manual `axis` of a mesh; and without an axis those of a
    sequence that lies on one device, as its arrays in `tree` do or not lie on a mesh."""
    return TimeShards(axis) if axis is not None or on_mesh(tree) else OneDevice()
