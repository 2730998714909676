"""The bytes that a compiled program moves, from its optimised HLO.

Every operation on the device reads its operands and writes its results once; of an array that it
only slices, the slices; of one that it only updates, the update. Within a fusion nothing moves.
Caches are not modelled: small arrays that stay in the L2 cache count like others. (XLA's own
figure, "bytes accessed", needs a device that holds the program.)
"""

import functools

from tools.hlo import Computation, Hlo, Instruction

# Nothing runs on the device for these, or it is counted where it stands.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while",
    "optimization-barrier", "partition-id", "replica-id", "opaque",
}  # fmt: skip
_HOLDERS = {"call", "conditional", "async-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is put


class Moved:
    """What the computations of a program move.

    **Arguments:**

    - `hlo`: the program.
    """

    def __init__(self, hlo: Hlo):
        self.hlo = hlo

    def by(self, name: str) -> int:
        """Bytes that an execution of a computation moves, its loops aside."""
        computation = self.hlo.computations.get(name)
        if computation is None:
            return 0
        return sum(self._moved_by(computation, i) for i in computation.instructions.values())

    def _moved_by(self, computation: Computation, found: Instruction) -> int:
        if found.opcode in _FREE or found.opcode.endswith("-done"):
            return 0
        if found.opcode in _HOLDERS:
            return sum(map(self.by, found.called()))
        if found.opcode in _SLICES:
            return 2 * found.size
        sizes = [computation.instructions[name].size for name in found.operands]
        if found.opcode in _UPDATES:
            return 2 * sizes[_UPDATES[found.opcode]]
        if found.opcode == "fusion":
            return self._moved_by_fusion(*found.called())
        return sum(sizes) + found.size

    @functools.cache  # noqa: B019 (a module lives as long as its figures are made)
    def _moved_by_fusion(self, name: str) -> int:
        fused = self.hlo.computations[name]
        results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        read = sum(_taken(fused, parameter) for parameter in fused.parameters)
        return read + sum(_put(fused, result) for result in results)


def _taken(fused: Computation, parameter: Instruction) -> int:
    """What a fusion reads of a parameter."""
    total = 0
    for user, place in fused.uses(parameter.name):
        if user.opcode in _UPDATES and place == 0:
            continue
        if user.opcode not in _SLICES or place > 0:
            return parameter.size
        total += user.size
    return min(total, parameter.size)


def _put(fused: Computation, result: str) -> int:
    """What a fusion writes of a result."""
    found = fused.through_views(result)
    if found.opcode in _UPDATES:
        return fused.instructions[found.operands[_UPDATES[found.opcode]]].size
    return fused.instructions[result].size
