"""A mesh of devices of several processes, and what lies on it."""

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from ._text import Tokens

_T = TypeVar("_T", bound=PyTree)
BATCH = PartitionSpec("data", "time")


def make_mesh(data: int, time: int) -> Mesh:
    """All devices of all processes; those along time are neighbours."""
    return jax.make_mesh((data, time), ("data", "time"), axis_types=(AxisType.Auto,) * 2)


def replicate(tree: _T, mesh: Mesh) -> _T:
    """The arrays of process 0, whole on every device. All processes call it, each with arrays of
    the same shapes."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    return jax.tree.map(place, multihost_utils.broadcast_one_to_all(tree))


def windows(
    mesh: Mesh, tokens: Tokens, starts: Int[np.ndarray, " batch"], length: int
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """`(inputs, targets)`: pieces of the text, and the characters that follow each of theirs.

    Windows lie along the first axis of the mesh and time along the second. A process looks up only
    those characters that its own devices hold.
    """

    def lay(shift: int) -> Int[Array, "batch length"]:
        def part(index):
            rows, columns = index
            return tokens[starts[rows, None] + np.arange(length)[columns] + shift]

        sharding = NamedSharding(mesh, BATCH)
        return jax.make_array_from_callback((len(starts), length), sharding, part)

    return lay(0), lay(1)
