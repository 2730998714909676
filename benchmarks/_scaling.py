"""A model of how fast a sequence is solved on several devices, from what one device takes and from
the collectives of the compiled program.

A device makes its share of the steps, and a few hundred more: those that its part starts early, and
those by which the end of its part is judged. Then the exchanges: in rounds as deep as a tree over
the devices, each of which takes the latency of the network, and the bytes. Nothing overlaps. What
several devices of one machine share, its memory above all, is not modelled.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# The steps that a device makes beside its share: early ones; and at its end disturbed ones, some
# side by side, and those that tell how much of a deviation it keeps.
EARLY, JUDGED = 128, 256


class Network(NamedTuple):
    """What joins the devices.

    - `latency`: seconds of an exchange of next to nothing between two devices.
    - `bandwidth`: bytes per second that a device sends.
    """

    latency: float
    bandwidth: float


NETWORKS = {
    "one machine: 15 µs, 10 GB/s": Network(15e-6, 10e9),
    "one rack: 50 µs, 10 GB/s": Network(50e-6, 10e9),
    "one town: 2 ms, 1 GB/s": Network(2e-3, 1e9),
    "the internet: 100 ms, 10 MB/s": Network(100e-3, 10e6),
}


def turns(iterations: int) -> dict[str, int]:
    """How often the loops of the package turn, in a solve of a system that is solved at the first
    attempt and forgets its derivative within the early steps."""
    return {"attempts": 1, "iterations": iterations, "passes?": 1}


def exchanges(
    collectives: Sequence[Mapping[str, Any]], turned: Mapping[str, int]
) -> list[tuple[str, int, int]]:
    """`(kind, bytes, how often)` in a run, of the collectives that are made at all."""
    found = []
    for one in collectives:
        times = one["count"] * math.prod(turned.get(loop, 0) for loop in one["loops"])
        if times:
            found.append((one["kind"], one["nbytes"], times))
    return found


def seconds_of_exchange(kind: str, nbytes: int, devices: int, network: Network) -> float:
    """Of one collective to which each device gives so many bytes."""
    if devices == 1:
        return 0.0
    rounds = 1 if kind == "collective-permute" else math.ceil(math.log2(devices))
    received = nbytes * (devices - 1 if kind == "all-gather" else rounds)
    return rounds * network.latency + received / network.bandwidth


def seconds(
    step: float,
    length: int,
    devices: int,
    network: Network,
    made: Sequence[tuple[str, int, int]],
    *,
    sweeps: float = 1.0,
) -> float:
    """Of a solve on several devices.

    **Arguments:**

    - `step`: seconds of a step on one device.
    - `made`: what `exchanges` found.
    - `sweeps`: how many passes over the steps the method makes, each as long as one of single
        steps; on one device, for which there is a scan, one.
    """
    if devices == 1:
        return step * length
    own = math.ceil(length / devices) * sweeps + min(EARLY + JUDGED, length)
    return step * own + sum(
        times * seconds_of_exchange(kind, nbytes, devices, network) for kind, nbytes, times in made
    )


def speed_up(step: float, length: int, devices: int, network: Network, made, **options) -> float:
    """How many times faster than on one device."""
    alone = seconds(step, length, 1, network, made)
    return alone / seconds(step, length, devices, network, made, **options)
